"""Results are accompanied by the audit of their corpus, which the cards sum up."""

import json

from training_tools import Workbench, forget_accelerator, script

from hf_s2e.hub.cards import write_card


def test_a_cross_validation_leaves_the_audit_for_the_card(tmp_path):
    work, out = Workbench(tmp_path), tmp_path / "results"
    flags = {"protocol": "loso", "runs": 1, "methods": "residual_adapter", "max_train_steps": 1}
    flags |= {"model_name_or_path": work.adapter, "num_train_epochs": 1, "per_device_train_batch_size": 5}
    forget_accelerator()
    script("cross_validate").main(work.flags(output_dir=out, **flags))
    text = (out / "audit.json").read_text()
    report = json.loads(text)
    assert report["counts"]["files"] == 24 and "ua_by_speaker_in_protocol" in report["counts"]
    assert str(tmp_path) not in text  # it may be published

    model = work.model()
    model.save_adapter(tmp_path / "s2e-toy", "toy")
    card = write_card(tmp_path / "s2e-toy", out / "summary.json").read_text()
    audit = card.partition("### Audit of the corpus")[2].partition("##")[0]
    assert "the speaker alone, in the protocol's folds" in audit
    assert all(finding["message"] in audit for finding in report["findings"])

    (out / "audit.json").write_text('{"findings": []}')  # it is made once
    forget_accelerator()
    script("cross_validate").main(work.flags(output_dir=out, report_only=True, **flags))
    assert (out / "audit.json").read_text() == '{"findings": []}'
