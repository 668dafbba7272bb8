"""The command line: reads the words, composes the config once, and starts the task."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from qlora.config import trust
from qlora.config.arguments import Arguments, read_arguments
from qlora.config.command import ComposedCommand, compose_command, show_config
from qlora.config.compose import (
    START_VARIABLE,
    now,
    open_entries,
    opened_hydra,
    read_typed,
    refuse_unreadable,
    register,
)
from qlora.config.conversion import without_hydra
from qlora.config.overrides import with_environment
from qlora.config.paths import give_home
from qlora.errors import RunError
from qlora.runtime import console
from qlora.runtime.environment import prepare_environment
from qlora.runtime.exit_codes import exiting
from qlora.runtime.versions import versions_page
from qlora.sweep import names
from qlora.sweep.engines import check_engine
from qlora.upstream.hydra_run import show

RESTORED = (START_VARIABLE, "HOME")
"""Variables of one command; who calls `main` inside a process of its own may start others."""


def main() -> None:
    """Runs the command line and exits: 0 when all went well, 1 after a failure, 130 after Ctrl-C, 75 once saved."""
    previous = {name: os.environ.get(name) for name in RESTORED}
    try:
        with exiting(sys.argv[1:]):
            _check_surroundings()
            with trust.fixed_resolvers():
                run(sys.argv[1:])
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _check_surroundings() -> None:
    """Raises `RunError` where Python was started so that nothing could run."""
    if sys.flags.optimize > 1:
        raise RunError(
            "Python was started with -OO or PYTHONOPTIMIZE=2, which removes docstrings that this program and its "
            "libraries read; start it without"
        )
    try:
        Path.cwd()
    except OSError as error:
        raise RunError(f"the working directory is gone ({error.strerror}); change to one that exists") from error


def run(argv: list[str]) -> None:
    """Does what a command line asks for; raises `UserError` for a mistake in it."""
    if page := _page(argv):
        page()
        return
    trust.check_version()
    register()
    names.register()
    arguments = read_arguments(argv)
    if arguments.shows:
        _show(arguments)
        return
    refuse_unreadable(arguments.overrides)
    check_engine(arguments.overrides)
    arguments = arguments.read(read_typed(arguments.overrides, arguments.config_dir))
    overrides, flags = with_environment(arguments.overrides), arguments.flags
    arguments = replace(arguments, overrides=overrides)
    os.environ.setdefault(START_VARIABLE, now())
    if flags.explain is not None:
        from qlora.config.explain_key import print_explanation

        print_explanation(flags.explain, overrides, arguments.config_dir, multirun=arguments.multirun)
        return
    composed = compose_command(
        overrides,
        arguments.config_dir,
        multirun=arguments.multirun,
        leave_grid=not (flags.cfg or flags.info),
        printed=flags.resolve,
        is_read=True,
    )
    if flags.cfg == "job":
        sys.stdout.write(show_config(without_hydra(composed.node), flags.package, resolve=flags.resolve))
    elif flags.cfg or flags.info:
        _show(arguments, composed.base)
    else:
        _start(arguments, composed)


def _page(argv: list[str]) -> Callable[[], None] | None:
    """Returns what prints the page that a command line asks for instead of a run; None: it asks for none."""
    first = next((word for word in argv if not word.startswith("-")), None)
    if {"-h", "--help"} & {*argv} or first == "help":
        from qlora.config.help import print_help

        return partial(print_help, [word for word in argv if word != "help"])
    if "--version" in argv or first == "version":
        return lambda: print(versions_page())
    if "--schema" in argv:
        from qlora.config.json_schema import print_schema

        return partial(print_schema, first)
    return None


def _show(arguments: Arguments, composed: DictConfig | None = None) -> None:
    """Prints what Hydra says of itself or of the config, behind our versions where all is asked for."""
    if arguments.flags.info == "all":
        print(f"{versions_page()}\n")
    with opened_hydra(arguments.overrides, arguments.config_dir) as hydra:
        show(hydra, arguments.flags, open_entries(arguments.overrides), composed)


def _start(arguments: Arguments, composed: ComposedCommand) -> None:
    """Starts the task, or a sweep of it."""
    from qlora.tasks import needs_of
    from qlora.tasks.start import Command, start

    needs = needs_of(composed.config)
    if needs.caches or composed.config.data.cache_dir:
        give_home(composed.config.data.cache_dir)
    prepare_environment(verbose=bool(composed.node.hydra.verbose))
    for line in arguments.describe_reading():
        console.say(line)
    start(Command(arguments, composed, needs))
