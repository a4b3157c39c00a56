"""Log-probabilities of prompts: those of transformers, whatever the chunks, and sent once."""

import pytest
import torch
from helpers import SMALL, make_rig

from clif import LLM, Sampling
from clif.control.claims import logprobs_objection
from clif.engine.prompt_logprobs import PromptLogprobs, PromptScoring
from clif.engine.scheduler import Chunk, Sequence
from clif.types import Request, TokenEvent, TokenLogprob

ANSWERED = Sampling(max_tokens=6, ignore_eos=True, logprobs=2)
SCORED = Sampling(max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=True)
PROMPTS = [[5, 6, 7, 8, 9], [9], list(range(1, 91))]


@pytest.fixture(scope="module")
def model(tiny_config) -> str:
    return f"random:{tiny_config}"


def ask(id: int, prompt: list[int], sampling: Sampling) -> Request:
    return Request(id=id, prompt=tuple(prompt), sampling=sampling)


def values(tokens) -> list[tuple[int, float]]:
    return [(one.token, pytest.approx(one.logprob, abs=1e-5)) for one in tokens]


def test_they_are_those_of_transformers(stories) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    with LLM(stories, model={"dtype": "float32", "device": "cpu"}) as llm:
        for prompt, found in zip(PROMPTS, llm.generate(PROMPTS, SCORED), strict=True):
            with torch.no_grad():
                rows = reference(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
            known = rows.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0].tolist()
            assert [one.logprob for one in found.prompt_logprobs] == pytest.approx(known, abs=1e-4)
            best = rows.topk(2)
            assert [[t for t, _ in one.top] for one in found.prompt_logprobs] == best.indices.tolist()


@pytest.mark.parametrize("adapter", [0, 1])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_read_as_a_prompt_has_the_same_whatever_the_chunks_the_reuse_and_the_room(model, adapter, overlap):
    """Prompts of 110 tokens in chunks of 24, with too few blocks for two: one is preempted, after its own are sent."""
    rig = make_rig(model, engine={**SMALL, "kv_tokens": 256, "overlap": overlap})
    if adapter:
        rig.fill(1, seed=3)
    prompts = [[*range(n, n + 110)] for n in range(1, 6)]
    answers = rig.run([ask(i, prompt, ANSWERED) for i, prompt in enumerate(prompts)])
    read = []
    for i, prompt in enumerate(prompts):
        tokens = [token for event in answers[i] for token in event.tokens]
        read.append(ask(10 + i, [*prompt, *tokens], SCORED))
    found = rig.run(read)
    assert rig.engine.scheduler.preemptions > 0
    for i, prompt in enumerate(prompts):
        first, *others = found[10 + i]
        assert len(first.prompt_logprobs) == len(prompt) + 5 and not any(event.prompt_logprobs for event in others)
        reported = [one for event in answers[i] for one in event.logprobs]
        assert [(t.token, t.logprob) for t in first.prompt_logprobs[-6:]] == values(reported)
        assert [t.token for t in first.prompt_logprobs] == list(read[i].prompt[1:])


def test_only_those_who_ask_get_them_beside_others(model) -> None:
    with LLM(model, model={"dtype": "float32", "device": "cpu"}) as llm:
        plain = llm.generate(PROMPTS, ANSWERED)
        mixed = llm.generate(PROMPTS, [ANSWERED, SCORED, SCORED])
    assert mixed[0].token_ids == plain[0].token_ids and mixed[0].prompt_logprobs == ()
    assert [len(one.prompt_logprobs) for one in mixed] == [0, 0, 89] and mixed[2].token_ids[:6] == plain[2].token_ids


def test_a_prompt_that_is_preempted_in_its_middle_is_told_from_its_beginning() -> None:
    running = Sequence(ask(1, [5, 6, 7, 8], SCORED), 0.0, [5, 6, 7, 8])

    def compute(start: int, stop: int) -> None:
        scoring = PromptScoring.of([Chunk(running, start, stop, stop == 4)], torch.device("cpu"))
        assert scoring is not None
        values = torch.arange(start, start + len(scoring.rows)).float()[:, None].expand(-1, 3).neg()
        PromptLogprobs(scoring, values, torch.zeros(len(values), 2, dtype=torch.int64)).keep()

    for chunk in ((0, 2), (2, 3), (0, 2), (2, 4)):
        compute(*chunk)
    assert PromptScoring.of([Chunk(running, 3, 4, True)], torch.device("cpu")) is None, "the last row tells an answer's"
    assert running.scored is not None and [(one.token, one.logprob) for one in running.scored] == [
        (6, 0),
        (7, -1),
        (8, -2),
    ]


def test_a_replica_can_claim_only_those_of_the_prompt_and_if_asked() -> None:
    def event(*tokens: int) -> TokenEvent:
        reports = tuple(TokenLogprob(t, -1.0) for t in tokens)
        return TokenEvent(request_id=1, tokens=(3,), logprobs=(TokenLogprob(3, -1.0),), prompt_logprobs=reports)

    asked = Request(id=1, prompt=(7, 8, 9), sampling=SCORED)
    assert logprobs_objection(event(8, 9), asked, 10) == ""
    assert "not those of its prompt" in logprobs_objection(event(8), asked, 10)
    assert "none were asked for" in logprobs_objection(
        event(8, 9), Request(id=1, prompt=(7, 8, 9), sampling=ANSWERED), 10
    )


def test_they_come_with_the_answer_s_own(model) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs is without logprobs"):
        Sampling(prompt_logprobs=True)
