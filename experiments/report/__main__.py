"""python -m experiments.report: see page.py."""

if __name__ == "__main__":  # processes that make previews import this file, and need none of what follows
    from experiments.report.page import main
    from support.cli import command_line

    command_line(main)
