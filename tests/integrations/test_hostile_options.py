"""What a file asks for is bounded by what it holds: options that would take years or all memory are refused at once."""

import json
import time

import pytest

import models
import peftops


@pytest.mark.parametrize(
    "config, file, options",
    [
        (peftops.PromptTuningConfig(tokens=3), "adapter_config.json", {"num_virtual_tokens": 2**31}),
        (peftops.PrefixTuningConfig(tokens=3), "adapter_config.json", {"num_virtual_tokens": 2**40}),
        (peftops.LLaMAAdapterConfig(tokens=3, layers=1), "adapter_config.json", {"tokens": 2**31}),
        (peftops.BottleneckConfig(width=4), "adapter_config.json", {"width": 2**33}),
        (peftops.LoRAConfig(r=4), "adapter_config.json", {"r": 2**31}),
        (peftops.LoRAConfig(r=4), "adapter_config.json", {"rank_pattern": {"q_proj": 2**31}}),
        (peftops.LoRAConfig(r=4), "adapter_config.json", {"rank_pattern": {"(.*)*(.*)*(.*)*=": 4}}),
        (peftops.LoRAConfig(r=4), "adapter_config.json", {"alpha_pattern": {"(a|a|.)*=": 4.0}}),
        (peftops.MultiLoRAConfig(r=4), "peftops.json", {"n": 2**31}),
        (peftops.VeRAConfig(r=4), "adapter_config.json", {"r": 2**33}),
        (peftops.LoftQConfig(r=4), "peftops.json", {"iterations": 10**9}),
        (peftops.PiSSAConfig(r=4, iterations=4), "peftops.json", {"iterations": 10**9}),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "peft_type") else str(value),
)
def test_a_file_that_asks_for_too_much(tmp_path, config, file, options):
    peftops.save(peftops.attach(models.llama(), config), tmp_path)
    fields = json.loads((tmp_path / file).read_text())
    (fields["options"] if file == "peftops.json" else fields).update(options)
    (tmp_path / file).write_text(json.dumps(fields))
    model, start = models.llama(), time.perf_counter()
    harmless = "pattern" in str(options) and 2**31 not in options.get("rank_pattern", {}).values()
    if harmless:  # a pattern that matches nothing
        peftops.load(model, tmp_path)
    else:
        with pytest.raises(
            ValueError, match="no tensor in it has a dimension above|must be a whole number|says that its rank"
        ):
            peftops.load(model, tmp_path)
        assert not hasattr(model, "_peftops")
    assert time.perf_counter() - start < 30
