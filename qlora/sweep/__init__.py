"""Sweeps: folders of jobs that can be continued, the engines that run them, and what they found."""
