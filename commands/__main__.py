"""`python -m ilvr_commands …`, for launchers: `accelerate launch -m ilvr_commands train …`."""

import sys

from .main import main


sys.exit(main())
