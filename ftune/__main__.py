"""The console script: `ftune`, or `python -m ftune`."""

from ftune import process


def main() -> None:
    """Signals are heard before anything that takes time is imported."""
    process.run(_command)


def _command() -> None:
    from ftune.cli import app

    app()


if __name__ == "__main__":
    main()
