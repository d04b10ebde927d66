"""Where hf_spqr meets other libraries. Importing this registers the methods with Transformers and teaches PEFT."""

from hf_spqr.integrations import hub, legacy, transformers
from hf_spqr.when_imported import when_imported


def _teach_peft() -> None:
    from hf_spqr.integrations import peft

    peft.install()


transformers.register()
legacy.register()
hub.install()
when_imported("peft.tuners.lora.model", _teach_peft)
