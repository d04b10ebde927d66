"""Where hf_spqr meets other libraries. Importing this registers the methods with Transformers and teaches PEFT."""

from hf_spqr.integrations.oldest import check_transformers
from hf_spqr.when_imported import when_imported

check_transformers()  # before what older ones do not have is imported

from hf_spqr.integrations import hub, legacy, transformers  # noqa: E402


def _teach_peft() -> None:
    from hf_spqr.integrations import peft

    peft.install()


transformers.register()
legacy.register()
hub.install()
when_imported("peft.tuners.lora.model", _teach_peft)
