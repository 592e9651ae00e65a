import sys

from disttempnet.cli.main import main

sys.exit(main())
