"""``python -m vix COMMAND …``, also installed as ``vix``: one table from command to function."""

import importlib
import sys

# Command: its module in vix.cli, whose ``main()`` reads sys.argv, and what it does.
COMMANDS = {
    "plan": ("plan", "what a sweep would run, and what each run would cost"),
    "report": ("report", "accuracy, memory and time of runs, next to the published figures"),
    "summary": ("summary", "a model as a table of its layers, with parameters, FLOPs and sizes"),
    "diff": ("diff", "what differs between two runs"),
    "replay": ("replay", "repeat the step of a run whose loss or gradient was not finite"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:<9}{description}" for command, (_, description) in COMMANDS.items()]
        usage = "\n".join(["usage: vix COMMAND …, or python -m vix COMMAND …", "", *lines, "", "vix COMMAND --help says more."])
        if name in ("", "-h", "--help"):
            print(usage)
            return
        sys.exit(f"error: {name}: there is no such command; {', '.join(COMMANDS)}")
    module = importlib.import_module(f"vix.cli.{COMMANDS[name][0]}")
    del sys.argv[1]
    module.main()


if __name__ == "__main__":
    main()
