"""The command ``protofast``. Each command lives beside its system; this file only gathers them."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

COMMANDS = {  # name: (module, function or typer.Typer); modules import nothing heavy before their command runs
    "demo": ("protofast.pxgen.command", "demo"),
    "pxgen": ("protofast.pxgen.command", "pxgen"),
    "select": ("protofast.selection.command", "select"),
    "ddim": ("protofast.ddpm.command", "ddim"),
    "patronus": ("protofast.patronus.commands", "app"),
    "prodg": ("protofast.prodg.commands", "app"),
    "bench": ("protofast.bench.command", "bench"),
}


def build() -> typer.Typer:
    """The application; needs typer."""
    import typer
    from typer.core import TyperGroup

    class Group(TyperGroup):
        """Says an error in one line, and ends with exit code 1."""

        def invoke(self, ctx: Any) -> Any:
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends quietly when `| head` has seen enough
                raise
            except Exception as error:
                if hasattr(error, "exit_code") or ctx.params.get("debug"):  # typer's own usage errors have a code
                    raise
                typer.secho(f"error: {describe(error)}", fg="red", err=True)
                raise typer.Exit(1) from None

    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        debug: bool = typer.Option(False, "--debug", envvar="PROTOFAST_DEBUG", help="Show where an error came from."),
    ) -> None:
        """Explain generative models: which images a model knows, and which it reproduces.

        Start with `protofast demo`. Every command takes `--help`.
        """

    @app.command()
    def info() -> None:
        """Say what is available here: backends, what runs each operation, and why anything does not."""
        from ._backend import backend_info

        backend_info()

    for name, (module, function) in COMMANDS.items():
        command = getattr(import_module(module), function)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def describe(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    from ._backend import BackendUnavailableError

    mistakes = (ValueError, TypeError, IndexError, OSError, ImportError, BackendUnavailableError)
    if isinstance(error, mistakes) and text:
        return text
    return f"{type(error).__name__}: {text} (PROTOFAST_DEBUG=1 shows where)"


def main() -> None:
    """Entry point of ``protofast``."""
    try:
        import rich
        import typer
    except ImportError:
        sys.exit("The command protofast needs typer and rich: pip install 'protofast[cli]'")
    del rich, typer
    build()()


if __name__ == "__main__":
    main()
