"""What befalls a job: source of a program's function that the environment variable FAULTS, by a number, decides."""

SUFFER = """
import json, os, resource, signal, sys

def suffer(number):
    kind = json.loads(os.environ.get("FAULTS", "{}")).get(str(number))
    if kind == "raise":
        raise ValueError("a bad row")
    if kind == "exit":
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        bytearray(2**34)
"""
