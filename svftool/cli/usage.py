"""What is wrong with a command line, in one line."""

from __future__ import annotations

from typing import Any

import typer

from svftool.cli.help import value_of, words_given
from svftool.errors import did_you_mean


def is_help(error: typer.TyperException) -> bool:
    """Whether the text of an error is the help, because nothing at all was asked for."""
    return _kind(error) == "NoArgsIsHelpError"


def said(error: Any) -> str:
    """Return what a command line lacks or has too much, and the way out.

    Parameters
    ----------
    error : typer.TyperException
    """
    ctx = getattr(error, "ctx", None)
    way_out = "" if ctx is None else f" See '{ctx.command_path} --help'."
    kind = _kind(error)
    if kind == "NoSuchOption":
        flags = [flag for one in ctx.command.params for flag in one.opts] if ctx else []
        guess = did_you_mean(error.option_name, flags)
        return f"{error.option_name}: no such option.{guess or way_out}"
    if kind == "MissingParameter":
        return f"{_name(error)}: missing.{way_out}"
    if kind == "BadParameter":
        return f"{_name(error)}: {_complaint(error, ctx) or error.message}"
    text = error.format_message()
    return text if "Did you mean" in text else f"{text.rstrip('.')}.{way_out}"


def _complaint(error: Any, ctx: Any) -> str:
    """Say what is wrong with the value in our words, where it is one that an option takes."""
    taken = getattr(getattr(ctx, "command", None), "taken", {}).get(error.param.name)
    given = (value_of(flag, words_given(ctx)) for flag in error.param.opts)
    value = next((one for one in given if one is not None), None)
    return "" if taken is None or value is None else str(taken.complaint(value))


def _kind(error: Exception) -> str:
    """Return the name of an error's class; typer publishes only what they derive from."""
    return type(error).__name__


def _name(error: Any) -> str:
    """Return an option's long flag, or an argument's name."""
    if getattr(error.param, "param_type_name", "") == "argument":
        return str(error.param.name).upper()
    return max(getattr(error.param, "opts", ()), key=len, default="an option")
