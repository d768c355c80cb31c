"""Errors of what a button does, as one line in the page. Needs Gradio."""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing

import gradio as gr

from core.errors import one_line
from core.logging import get_logger

log = get_logger("demo")


def told(function: Callable) -> Callable:
    """A function whose refusals become one line in the page; others are logged, not shown."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        try:
            return function(*args)
        except Exception as error:
            raise _refusal(error) from None

    return call


def told_on_the_way(function: Callable) -> Callable:
    """The same of a generator."""

    @functools.wraps(function)
    def go(*args: object) -> Iterator[object]:
        try:
            with closing(function(*args)) as parts:
                yield from parts
        except Exception as error:
            raise _refusal(error) from None

    return go


def _refusal(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    line = one_line(error)
    if line is None:
        log.error("a request failed", exc_info=error)
        line = "something went wrong on the server, which has written what into its log"
    return gr.Error(line, duration=8, print_exception=False, title="Not possible")
