"""`python -m agentgym.cli`, where no script is installed."""

import sys

from agentgym.cli import main

sys.exit(main())
