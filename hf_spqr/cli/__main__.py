"""``python -m hf_spqr.cli`` is ``hf-spqr``."""

from hf_spqr.cli import main

main()
