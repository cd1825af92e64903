"""``python -m vix COMMAND …``, also installed as ``vix``: one table from command to function."""

import importlib
import os
import signal
import sys

from vix.errors import UserError

# Command: its module in vix.cli, whose ``main()`` reads sys.argv, and what it does.
COMMANDS = {
    "plan": ("plan", "list the runs of a sweep and their cost, without starting them"),
    "report": ("report", "accuracy, memory and time of runs, next to the published figures"),
    "summary": ("summary", "layers of a model, with output shapes, parameters and FLOPs"),
    "diff": ("diff", "compare the configs, versions and results of two runs"),
    "evaluate": ("evaluate", "accuracy, loss and confusion matrix of trained runs, also on other images"),
    "predict": ("predict", "classes of image files, as CSV"),
    "cost": ("cost", "latency, throughput and memory of a model in inference"),
    "export": ("export", "write a trained model as an ONNX file, or for torch.export"),
    "replay": ("replay", "repeat the step whose loss or gradient was not finite, and name the layer"),
}
READ_ONLY = ("report", "diff")  # the commands that only read results


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:<9}{description}" for command, (_, description) in COMMANDS.items()]
        usage = "\n".join(
            ["usage: vix COMMAND …, or python -m vix COMMAND …", "", *lines, "", "vix COMMAND --help lists options."]
        )
        if name in ("", "-h", "--help"):
            print(usage)
            return
        sys.exit(f"error: {name}: unknown command; valid: {', '.join(COMMANDS)}")
    try:
        module = importlib.import_module(f"vix.cli.{COMMANDS[name][0]}")
        del sys.argv[1]
        if name not in READ_ONLY and os.environ.get("WORLD_SIZE") not in (None, "", "1"):
            from vix.system.distributed import check_environment  # imports PyTorch, which not every command needs

            check_environment()
        module.main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
