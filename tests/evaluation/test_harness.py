"""lm-eval on local files: its figures are the ones we compute by hand."""

import builtins
import json
import os

import pytest
import torch

from rankine.errors import UserError
from rankine.evaluation.harness import evaluate_tasks

QUESTIONS = [
    {"question": f"What is {n} + {n}?", "choices": [str(n), str(2 * n), "a lot"], "answer": n % 3}
    for n in range(12)
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def by_hand(model, tokenizer, rows):
    """Share of questions whose right choice has the highest log-likelihood after the question."""
    right = 0
    for row in rows:
        scores = []
        context = tokenizer(row["question"])["input_ids"]
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            places = torch.arange(len(context), ids.shape[1])
            scores.append(float(log_p[places - 1, ids[0, places]].sum()))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(rows)


@pytest.mark.slow
@pytest.mark.process  # lm-eval asks pip what is installed
def test_multiple_choice_and_yaml(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder / "sums.jsonl", QUESTIONS)
    write(folder / "pages.jsonl.data", [{"page": "one page of text"}, {"page": "and another"}])
    (folder / "pages.yaml").write_text(
        "task: pages\n"
        "dataset_path: json\n"
        "dataset_kwargs: {data_files: {test: pages.jsonl.data}}\n"  # relative to the task's file
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{page}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    found = evaluate_tasks(model, tokenizer, folder)
    assert found["sums"]["acc"] == pytest.approx(by_hand(model, tokenizer, QUESTIONS))
    assert found["pages"]["bits_per_byte"] == pytest.approx(8.0, rel=0.1)  # 257 random bytes
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "HF_DATASETS_OFFLINE" not in os.environ
    import datasets
    import huggingface_hub

    assert not datasets.config.HF_DATASETS_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"question": "q", "choices": ["a"]}', "found: choices, question"),
        ("a.jsonl", '{"question": "q", "choices": ["a"], "answer": 3}', "below 1"),
        ("a.jsonl", '{"question": "q", "choices": "a", "answer": 0}', "list of choices"),
        ("a.jsonl", "{", "line 1"),
        ("a.jsonl", "", "found none"),
        ("a.yaml", "task: !function os.system", "the tag"),
        ("a.yaml", "task: ../../escaped", "letters, digits"),
        ("a.yaml", "task: a\ninclude: other.yaml", "write its fields out"),
        ("a.yaml", "[" * 60, "levels"),
        ("a.yaml", "group: x", '"task" name'),
        ("a.csv", "x", "task file"),
    ],
)
def test_mistakes(model, tokenizer, tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        evaluate_tasks(model, tokenizer, tmp_path / name)


def test_missing_files(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="found nothing"):
        evaluate_tasks(model, tokenizer, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="found none"):
        evaluate_tasks(model, tokenizer, tmp_path)


def test_without_lm_eval_one_sentence(model, tokenizer, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **kwargs):
        if name == "lm_eval":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'rankine\[eval\]'"):
        evaluate_tasks(model, tokenizer, tmp_path)
