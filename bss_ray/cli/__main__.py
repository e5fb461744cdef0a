"""`python -m bss_ray.cli` is `bss-ray`."""

from bss_ray.cli import main

raise SystemExit(main())
