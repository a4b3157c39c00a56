"""Scores of answers: published values of the metrics, intervals, groups, and what is never run."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clif.config import QUALITY_METRICS, ConfigError, config_from_tree
from clif.data.instruct import make_row
from clif.quality import libraries
from clif.quality.bootstrap import bootstrap
from clif.quality.check import check_rows, check_scoring
from clif.quality.libraries import code_language
from clif.quality.process import Outcome, ScoringProcess
from clif.quality.score import CHEAP, MOST_GROUPS, score
from clif.quality.work import ALL, CLASS, CLIENT, Answer, Score, ScoringError, Testing, Work

PYTHON = Testing(command=(sys.executable, "-I", "{program}"), timeout_s=20.0)


def answer(text: str, reference: str = "yes", **fields: Any) -> Answer:
    row = make_row(0, {"prompt": "p", "completion": reference, **fields})
    return Answer.of(row, text)


def scores(metric: str, *answers: Answer, **settings: Any) -> list[Score]:
    return score(Work(version=1, metrics=(metric,), answers=answers, **settings))  # type: ignore[arg-type]


def value(metric: str, *answers: Answer, **settings: Any) -> float:
    return scores(metric, *answers, **settings)[0].value


def test_bleu_and_chrf_are_those_that_sacrebleu_publishes() -> None:
    """The first example of sacrebleu's README: BLEU 48.53, chrF2 59.73 with its three references; here with one."""
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU, CHRF

    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    pairs = [answer(t, r) for t, r in zip(texts, references, strict=True)]
    assert value("bleu", *pairs) == pytest.approx(BLEU().corpus_score(texts, [references]).score, abs=1e-9)
    assert value("chrf", *pairs) == pytest.approx(CHRF().corpus_score(texts, [references]).score, abs=1e-9)
    assert value("bleu", *pairs) == pytest.approx(45.07, abs=0.01)
    assert value("bleu", pairs[0]) == pytest.approx(100) and value("chrf", pairs[0]) == pytest.approx(100)


def test_rouge_is_the_f_measure_that_rouge_score_publishes() -> None:
    """The example of its README: ROUGE-L of precision 5/8 and recall 5/9."""
    pytest.importorskip("rouge_score")
    pair = answer("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert value("rouge", pair) == pytest.approx(100 * 2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9), abs=1e-6)


def test_codebleu_is_that_of_the_library_s_own_example() -> None:
    pytest.importorskip("codebleu")
    pytest.importorskip("tree_sitter_python")
    pair = answer("def add ( a , b ) :\n return a + b", "def sum ( first , second ) :\n return second + first")
    assert value("codebleu", pair) == pytest.approx(55.378, abs=1e-2)


@pytest.mark.parametrize(
    ("text", "fields", "right"),
    [
        ("Card_Arrival.\nBecause it says so", {"reference": "card_arrival"}, 1.0),
        ('"card_arrival"', {"reference": "card_arrival"}, 1.0),
        ("card arrival", {"reference": "card_arrival"}, 0.0),
        ("", {"reference": "card_arrival"}, 0.0),
        ("72", {"reference": "48 + 24 = 72\n#### 72", "label": 72}, 1.0),
        # Numbers of classes, as many data sets have them, are not what the model is to write.
        ("positive", {"reference": "positive", "label": 1}, 1.0),
        ("1", {"reference": "positive", "label": 1}, 0.0),
        ("72", {"reference": "48 + 24 = 72\n#### 72"}, None),
    ],
)
def test_accuracy_is_of_the_first_line_against_the_label(text: str, fields: Any, right: float | None) -> None:
    found = scores("accuracy", answer(text, **fields))
    assert [one.value for one in found] == ([] if right is None else [right])


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("text", "fields", "right"),
    [
        ('{"a": 1}', {"reference": "[]"}, 1.0),
        ('{"a": 1', {"reference": "[]"}, 0.0),
        ('{"a": NaN}', {"reference": "[]"}, 0.0),
        ("[" * 100_000, {"reference": "[]"}, 0.0),
        ('{"name": "x"}', {"schema": SCHEMA}, 1.0),
        ('{"name": 3}', {"schema": SCHEMA}, 0.0),
        ("words", {"reference": "words"}, None),
    ],
)
def test_json_is_valid_if_it_parses_and_is_of_the_row_s_schema(text: str, fields: Any, right: float | None) -> None:
    found = scores("json_valid", answer(text, **fields))
    assert [one.value for one in found] == ([] if right is None else [right])


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "http://127.0.0.1:9/schema.json"}])
def test_a_schema_that_is_none_or_lies_elsewhere_is_refused_and_nothing_is_fetched(schema: dict[str, Any]) -> None:
    with pytest.raises(ScoringError, match=r'row 0 \(from 0\): its "schema" is no JSON schema that stands alone'):
        scores("json_valid", answer("{}", schema=schema))


def test_a_check_is_a_regular_expression_and_runs_nothing(tmp_path: Path) -> None:
    asked = {"check": r"#### 72\b"}
    assert value("pass_rate", answer("#### 72", **asked), answer("#### 721", **asked)) == 0.5
    with pytest.raises(ScoringError, match=r'its "check" is no regular expression'):
        scores("pass_rate", answer("x", check="("))


def test_no_answer_is_run_unless_the_operator_names_a_command(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    wicked = answer(f"open({str(trace)!r}, 'w')", test="assert True")
    assert scores("pass_rate", wicked) == [] and not trace.exists()
    assert value("pass_rate", wicked, testing=PYTHON) == 1.0 and trace.exists()


def test_the_command_passes_and_fails_by_its_exit_status_and_ends_in_time(tmp_path: Path) -> None:
    test = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    right, wrong = answer("def add(a, b): return a + b", test=test), answer("def add(a, b): return 3", test=test)
    assert value("pass_rate", right, wrong, testing=PYTHON) == 0.5
    slow = answer("import time; time.sleep(60)", test="")
    quick = Testing(command=PYTHON.command, timeout_s=0.2)
    assert value("pass_rate", slow, testing=quick) == 0.0
    both = answer("def add(a, b): return a + b", test=test, check="lambda")
    assert value("pass_rate", both, testing=PYTHON) == 0.0
    with pytest.raises(ScoringError, match=r"quality.test_command cannot be started"):
        scores("pass_rate", right, testing=Testing(command=("/no/such/command", "{program}")))


def test_the_command_gets_no_variable_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIF_API_KEY", "secret")
    looks = answer("import os", test="assert 'CLIF_API_KEY' not in os.environ")
    assert value("pass_rate", looks, testing=PYTHON) == 1.0


def test_loss_and_perplexity_are_over_tokens_of_all_answers() -> None:
    pair = [
        Answer(row=i, text="", reference="", loss=loss, tokens=n) for i, (loss, n) in enumerate([(2.0, 1), (1.0, 2)])
    ]
    (loss,) = scores("loss", *pair)
    assert (loss.value, loss.count) == (1.0, 3) and loss.low is not None and loss.low < 1 < (loss.high or 0)
    assert value("perplexity", *pair) == pytest.approx(np.e)
    known = scores("loss", *pair, loss=0.5, loss_tokens=7)
    assert known == [Score(metric="loss", value=0.5, count=7)]


def test_a_bootstrap_interval_is_the_same_for_the_same_seed_holds_the_figure_and_tightens() -> None:
    draws = np.random.default_rng(0)

    def mean(total: Any) -> float:
        return float(total[0] / total[1])

    def table(count: int) -> Any:
        return np.stack([draws.normal(5, 1, count), np.ones(count)], axis=1)

    few, many = table(20), table(2000)
    assert bootstrap(few, mean, seed=1) == bootstrap(few, mean, seed=1) != bootstrap(few, mean, seed=2)
    (low, high), (lower, upper) = bootstrap(few, mean, 1), bootstrap(many, mean, 1)
    assert low < mean(few.sum(0)) < high and upper - lower < (high - low) / 3
    # That of a mean is known: 1.96 standard errors on either side.
    assert upper - lower == pytest.approx(2 * 1.96 * many[:, 0].std() / 2000**0.5, rel=0.1)


def test_classes_and_clients_have_scores_of_their_own_and_they_are_bounded() -> None:
    rows = [answer("yes", client=f"c{i % 2}", **{"class": f"k{i % 60:02}"}) for i in range(120)]
    rows.append(answer("no", domain="k00"))
    found = scores("exact_match", *rows)
    assert (found[0].group, found[0].count) == (ALL, 121) and found[0].value == pytest.approx(120 / 121)
    classes = [one for one in found if one.group == CLASS]
    assert len(classes) == MOST_GROUPS and (classes[0].name, classes[0].value) == ("k00", pytest.approx(2 / 3))
    assert [(one.name, one.count) for one in found if one.group == CLIENT] == [("c0", 60), ("c1", 60)]


def test_rows_that_use_a_field_for_something_else_are_rows_as_before() -> None:
    row = make_row(0, {"prompt": "p", "completion": "c", "schema": "s", "test": 3, "label": [1], "class": 2})
    assert row.marks.schema is None and row.marks.test is None and row.marks.label is None
    assert row.marks.category == "2"


def test_a_missing_library_is_a_sentence_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries.MODULES, "rouge", ("no_such_library", "clif[quality]"))
    sentence = (
        r'rouge needs a library that is not installed: python -m pip install "clif\[quality\]", or leave rouge out'
    )
    with pytest.raises(ScoringError, match=sentence):
        libraries.check_libraries(("exact_match", "rouge"))
    with pytest.raises(ScoringError, match=sentence):
        scores("rouge", answer("a"))


def test_code_is_compared_in_the_row_s_own_language_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("C++", "c#", "Python", "JS", "golang")
    assert [code_language(name, "java") for name in names] == ["cpp", "c_sharp", "python", "javascript", "go"]
    assert code_language(None, "java") == "java" and code_language("bash", "python") is None
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "tree_sitter_c_sharp" else "there")
    quality = config_from_tree(
        {"model": {"path": "m"}, "train": {"enabled": False}, "quality": {"metrics": ["codebleu"]}}
    ).quality
    rows = [make_row(0, {"prompt": "p", "completion": "c", "language": name}) for name in ("bash", "C#")]
    check_rows(rows[:1], quality)
    with pytest.raises(ScoringError, match="codebleu needs tree-sitter-c-sharp to read c_sharp: python -m pip install"):
        check_rows(rows, quality)


def test_the_cheap_metrics_need_no_library() -> None:
    assert CHEAP.isdisjoint(libraries.MODULES) and set(libraries.MODULES) < set(QUALITY_METRICS)


def test_the_process_scores_as_this_one_and_says_why_it_could_not() -> None:
    process, asked = ScoringProcess(), Work(version=1, metrics=("exact_match", "json_valid"), answers=(answer("yes"),))
    process.start(asked)
    assert wait(process) == Outcome(scores=tuple(score(asked)))
    process.start(Work(version=1, metrics=("pass_rate",), answers=(answer("yes", check="("),)))
    assert "no regular expression" in wait(process).error
    process.start(Work(version=1, metrics=("pass_rate",), answers=(answer("x", test="1"),), testing=PYTHON))
    process.stop()
    assert process.poll() is None


def wait(process: ScoringProcess) -> Outcome:
    assert process._process is not None
    process._process.wait(60)
    found = process.poll()
    assert found is not None
    return found


def tree(tmp_path: Path, rows: str, **quality: Any) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    data = {"path": str(path)}
    return {
        "model": {"path": "m"},
        "data": data,
        "quality": {"exact_match_rows": 1, **quality},
        "train": {"enabled": False},
    }


def test_a_run_with_tests_and_no_command_is_refused_before_it_begins(tmp_path: Path) -> None:
    rows = '{"prompt": "p", "completion": "c", "split": "test", "test": "assert True"}'
    asked = {"metrics": ["pass_rate"]}
    with pytest.raises(ScoringError, match=r"pass_rate runs what a model wrote, and row 0 .* quality.test_command"):
        check_scoring(config_from_tree(tree(tmp_path, rows, **asked)))
    check_scoring(config_from_tree(tree(tmp_path, rows, **asked, test_command=["run", "{program}"])))
    check_rows([], config_from_tree(tree(tmp_path, rows)).quality)


def test_wrong_settings_are_refused_with_the_names_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="codebleu"):
        config_from_tree(tree(tmp_path, "{}", metrics=["blue"]))
    with pytest.raises(ConfigError, match="has a name twice"):
        config_from_tree(tree(tmp_path, "{}", metrics=["bleu", "bleu"]))
    with pytest.raises(ConfigError, match=r"quality.test_command names no file"):
        config_from_tree(tree(tmp_path, "{}", test_command=["python"]))
