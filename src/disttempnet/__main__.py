import sys

from disttempnet.cli import main

sys.exit(main())
