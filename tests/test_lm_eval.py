"""The `lm-eval` harness on a local task, without a network: `pip install -e '.[eval]'`, or these tests are skipped."""

import json
import math
from importlib.util import find_spec

import pytest
import torch

from pmnet.data.files import open_files
from pmnet.eval.bits import bits_per_byte
from pmnet.model import ByteTokenizer
from tests.conftest import small_model

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # those of the harness
]


def evaluate(model, folder, task):
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=ByteTokenizer(), batch_size=2)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.json")}}}
    built = ConfigurableTask(config=data | {"task": "local", "test_split": "test"} | task)
    return simple_evaluate(lm, tasks=[built], bootstrap_iters=0, log_samples=True)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


def test_rolling_likelihood_is_our_bits_per_byte(offline):
    texts = ["the quick brown fox", "jumps over the lazy dog, again and again"]
    for index, text in enumerate(texts):
        (offline / f"{index}.txt").write_text(text)
    (offline / "docs.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = small_model("period")
    task = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    found = evaluate(model, offline, task)["results"]["local"]["bits_per_byte,none"]
    bits, _ = bits_per_byte(model, open_files([offline / "0.txt", offline / "1.txt"]))
    assert found == pytest.approx(bits, rel=1e-3)


def test_choices_are_scored_by_their_likelihood(offline):
    rows = [{"q": "one two", "choices": [" three", " xq"], "gold": 0}, {"q": "b", "choices": ["c", "zzz"], "gold": 1}]
    (offline / "docs.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = small_model("period")
    task = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    found = evaluate(model, offline, task)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([[*row["q"].encode(), *choice.encode()]])
            with torch.no_grad():
                logs = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
            count = len(choice.encode())
            scores.append(logs.gather(1, ids[0, 1:, None])[-count:].sum().item())
        right += scores.index(max(scores)) == row["gold"]
    assert found["results"]["local"]["acc,none"] == right / 2
    assert all(math.isfinite(r[0][0]) for s in found["samples"]["local"] for r in s["resps"])
