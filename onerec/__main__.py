"""`python -m onerec` is the `onerec` command; launchers such as torchrun start it so."""

import sys

from onerec.cli.main import main

sys.exit(main())
