"""The `curate` command: it finds the verb, runs it, and turns what went wrong into one line.

Nothing heavy is imported here: a verb's file is loaded when it is named (or listed by `--help`),
and imports what it works with when it runs.

Exit status: 0 done (a closed pipe included), 1 failed, 2 wrong usage or recipe, 3 a check failed,
130 interrupted and 143 ended by SIGTERM, both safe to resume.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

VERBS = (
    "run",
    "sketch",
    "index",
    "score",
    "rank",
    "filter",
    "reweight",
    "export",
    "sql",
    "neighbours",
    "status",
    "doctor",
)


class ClosedPipeError(Exception):
    """Whoever read our standard output has gone; click would make this exit status 1."""


class TerminatedError(BaseException):
    """SIGTERM came, which schedulers send some time before they kill."""


class Verbs(click.Group):
    """A group whose commands are loaded from `curate.commands.<verb>` when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs in the order of the work, not of the alphabet."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb's command, or None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"curate.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest verb in the message for one that does not exist."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], VERBS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(VERBS)}"
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, with a closed pipe told apart from a failure."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise ClosedPipeError from None
        return result


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_CURATE_COMPLETE=bash_source curate)" (or zsh, fish).',
)
@click.version_option(package_name="sdi-curate", prog_name="curate")
def cli() -> None:
    """Curate the training data of looped transformers by when in the loop each row matters."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; never raises."""
    with warnings.catch_warnings():
        warnings.showwarning = _warned
        return _main(argv)


def process() -> int:
    """`main` for a process that ends with it.

    Python looks for cycles once more before it ends, which takes a tenth of a second after the
    imports of `rank` or `sql`: not here, but where torch is. Libraries that come with it look for
    leaks then, and would report what is in cycles.
    """
    status = main()
    if "torch" not in sys.modules:
        gc.freeze()
    return status


@contextmanager
def _terminable() -> Iterator[None]:
    """Meanwhile SIGTERM unwinds as Ctrl-C does: processes end, and temporary files go.

    Where somebody has settled what it does, or in a thread, it is left alone.
    """
    ours, main = os.getpid(), threading.current_thread() is threading.main_thread()

    def end(number: int, _: object) -> None:
        if os.getpid() != ours:  # a process that was forked ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)  # what unwinds is not to be cut short
        raise TerminatedError

    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _main(argv: Sequence[str] | None) -> int:
    """Exceptions to exit statuses."""
    try:
        # standalone_mode=False: click hands us its exceptions and we choose the exit status
        with _terminable():
            result = cli.main(
                args=None if argv is None else list(argv), prog_name="curate", standalone_mode=False
            )
    except (click.exceptions.Abort, KeyboardInterrupt):  # the second from outside of click
        return _said("interrupted; nothing is lost: the same command continues", 130)
    except TerminatedError:
        return _said("terminated; nothing is lost: the same command continues", 143)
    except click.ClickException as failure:
        return _said(_usage_line(failure), failure.exit_code)
    except ClosedPipeError:
        _forget_stdout()
        return 0
    except Exception as failure:  # every failure ends as one line
        return _failed(failure)
    return result if isinstance(result, int) else 0


def _warned(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """A warning as one line without the place in our code that raised it."""
    click.echo(f"curate: warning: {' '.join(str(message).split())}", err=True)


def _usage_line(failure: click.ClickException) -> str:
    """The message on one line, with the help that belongs to it."""
    message = " ".join(failure.format_message().split())
    context = getattr(failure, "ctx", None)
    return f"{message} (see {context.command_path} --help)" if context else message


def _failed(failure: Exception) -> int:
    """One line for a failure: ours carry their exit status, others are a bug or the system's."""
    if os.environ.get("CURATE_TRACEBACK"):
        traceback.print_exception(failure)
    code = getattr(failure, "exit_code", None)
    text = " ".join(str(failure).split())
    if isinstance(code, int):
        return _said(text, code)
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return _said(f"{text}: free some space and run the same command again", 1)
    if isinstance(failure, OSError | MemoryError):
        return _said(f"{type(failure).__name__}: {text or 'out of memory'}", 1)
    return _said(f"{type(failure).__name__}: {text} (CURATE_TRACEBACK=1 shows where)", 1)


def _said(message: str, code: int) -> int:
    click.echo(f"curate: {message}", err=True)
    return code


def _forget_stdout() -> None:
    """Point standard output at nothing, so that Python's flush at exit finds no broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(process())
