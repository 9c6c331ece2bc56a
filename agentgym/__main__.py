"""The `agentgym` command as a module, for launchers that want one: `torchrun -m agentgym`."""

import sys

from agentgym.cli import main

if __name__ == "__main__":
    sys.exit(main())
