"""The two stages: order, the best draft, what Stage 2 sees, and that nothing depends on which sample is first."""

import functools
import math
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from engines import make_engine

from igrpo_jax import config
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.distributed import sharding
from igrpo_jax.distributed.preemption import Preempted
from igrpo_jax.learning import credit, exchange, filtering, objectives, stages
from igrpo_jax.learning.exchange import RolloutPart, StepPosition
from igrpo_jax.learning.rollout import Rollout, _usage_metrics
from igrpo_jax.learning.selection import best_is_known, is_solved, largest_value, needs_verification, select_draft
from igrpo_jax.learning.stages import PromptProgress, keep_best_refined
from igrpo_jax.models.policy import open_policy
from igrpo_jax.records import VERDICTS, Candidate, Completion, Prompt, Score
from igrpo_jax.rewards.failures import VerifierError
from igrpo_jax.rewards.rules import REWARDS, rules_of, score, total
from igrpo_jax.rewards.verifier import Verifier, statistics
from igrpo_jax.sampling import scoring
from igrpo_jax.sampling.requests import Request, Usage
from igrpo_jax.sampling.scheduler import Scheduler
from igrpo_jax.sampling.scoring import stage_key
from igrpo_jax.sampling.state import Sampling

QUESTIONS = ("1+2", "7+5-3", "9", "4-4+8-1", "2+2", "5+5")
N, G, LENGTH, KEPT = 4, 4, 12, 5


def settings(**changes):
    tree = config.default()
    tree.update_from_flattened_dict(
        {
            "seed": 5,
            "prompts_per_step": len(QUESTIONS),
            "model.dtype": "float32",
            "model.builtin.hidden_size": 32,
            "model.builtin.num_layers": 2,
            "model.builtin.num_heads": 4,
            "model.builtin.intermediate_size": 48,
            "data.instruction": "",
            "refine.instruction": "[{draft}]",
            "refine.max_draft_length": KEPT,
            "algorithm.num_drafts": N,
            "algorithm.num_generations": G,
            "rollout.max_completion_length": LENGTH,
            "rollout.temperature": 1.5,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.freeze(tree)


class StubVerifier:
    """Gives rewards 0 to 2 by the text alone, in threads that sleep: the later a text comes, the sooner its score."""

    def __init__(self, status="ok", delay=0.03):
        self._pool, self._status, self._delay = ThreadPoolExecutor(32), status, delay
        self._lock, self.submitted, self.finished, self.openings = threading.Lock(), [], [], set()
        self.steps, self.counted, self.shown = [], 0, []

    def start_step(self, step):
        self.steps.append(step)

    judgements = ()

    def statistics(self, scores, judgements):
        self.counted = len(scores)
        return statistics(scores)

    def submit(self, candidate, batch) -> Future:
        text, answer = candidate.text, candidate.answer
        self.submitted.append((text, answer))
        self.shown.append((text, candidate.draft))
        self.openings.add(candidate.opening)
        return self._pool.submit(self._grade, text, answer, self._delay * (1 + -len(self.submitted) % 8) / 8)

    def _grade(self, text, answer, delay):
        time.sleep(delay)
        with self._lock:
            self.finished.append((text, answer))
        return Score(self.reward(text), {"accuracy": self.reward(text)}, text[:1], self._status)

    @staticmethod
    def reward(text):
        return float(zlib.crc32(text.encode()) % 3)


class InstantVerifier(StubVerifier):
    """Gives each verdict before the next sample ends, so that what overlaps does not depend on the clock."""

    def submit(self, candidate, batch) -> Future:
        verdict = super().submit(candidate, batch)
        verdict.result()
        return verdict


@pytest.fixture(scope="module")
def policy():
    return open_policy(settings().model)


@pytest.fixture(scope="module")
def renderer(policy):
    c = settings()
    return Renderer(policy.tokenizer, c.data, c.refine, KEPT, policy.eos_ids)


@pytest.fixture(scope="module")
def prompts(renderer):
    return [Prompt(f"row {i}", 10 + i, q, "0", renderer.plain(q)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def schedulers(policy):
    """Schedulers by their number of slots; each is compiled once."""
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    sizes = {"longest_prompt": 32, "max_completion": LENGTH, "dtype": "float32"}
    with jax.set_mesh(mesh):
        engines = {
            slots: make_engine(policy.cfg, mesh, policy.eos_ids, slots=slots, steps_per_dispatch=k, **sizes)
            for slots, k in ((16, 4), (3, 5))
        }
    # -3: three slots, the host one dispatch behind
    return {slots: Scheduler(engine) for slots, engine in engines.items()} | {-3: Scheduler(engines[3], ahead=1)}


@pytest.fixture(scope="module")
def params(policy, schedulers):
    """Weights with which an EOS is often drawn, so that completions differ in length."""
    params = policy.load(schedulers[16].engine.mesh, 0)
    return params | {"embedding": params["embedding"].at[policy.eos_ids[0]].mul(2)}


@pytest.fixture(scope="module")
def collect(renderer, schedulers, params, prompts):
    """Collects a step. Afterwards all pages must be free, whatever the verifier does: sleep, die, fail."""

    def call(verifier=None, slots=16, step=3, wanted=None, fresh=None, **changes):
        scheduler = schedulers[slots]
        with jax.set_mesh(scheduler.engine.mesh):
            rollout = Rollout(settings(**changes), renderer, scheduler, verifier or StubVerifier())
            first = wanted or prompts
            try:
                return rollout.collect(params, step, lambda redraw: fresh(redraw) if redraw else first)
            finally:
                assert all(shard.pool.free == shard.pool.count for shard in scheduler.shards)

    return call


@pytest.fixture(scope="module")
def verifier():
    return StubVerifier()


@pytest.fixture(scope="module")
def rollout(collect, verifier):
    return collect(verifier)


def same(one, other):
    """Checks that two groups are equal in everything but the last bits of floats."""
    assert one.prompt.id == other.prompt.id
    assert one.kept == other.kept
    np.testing.assert_array_equal(one.context, other.context)
    for ours, theirs in ((one.drafts, other.drafts), (one.completions, other.completions)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
            assert (a.stage, a.sample_id, a.finished, a.text) == (b.stage, b.sample_id, b.finished, b.text)
            np.testing.assert_equal(asdict(a.score), asdict(b.score))  # unlike ==, NaN equals NaN


@pytest.mark.slow
def test_groups_and_samples_are_in_order(rollout, verifier, prompts):
    """Ordered by prompt and sample, though verdicts come in another order and some prompts refine before others."""
    groups, _ = rollout
    assert verifier.finished != verifier.submitted and sorted(verifier.finished) == sorted(verifier.submitted)
    assert all(group.prompt is prompt for group, prompt in zip(groups, prompts, strict=True))
    for group in groups:
        assert [draft.sample_id for draft in group.drafts] == list(range(N))
        assert [one.sample_id for one in group.completions] == list(range(G))
        assert {one.stage for one in group.drafts} == {"draft"} and {one.stage for one in group.completions} == {
            "refine"
        }
        for one in (*group.drafts, *group.completions):
            assert one.score.reward == StubVerifier.reward(one.text)
        np.testing.assert_array_equal(group.rewards, [one.score.reward for one in group.completions])
    texts = [one.text for group in groups for one in (*group.drafts, *group.completions)]
    assert len(set(texts)) > len(texts) / 2
    assert verifier.openings == {""}


def test_the_first_of_the_best_drafts_is_in_the_context(rollout, renderer, policy):
    groups, _ = rollout
    before = renderer.plain("")[:1]  # <|user|>
    ties = 0
    for group in groups:
        rewards = [draft.score.reward for draft in group.drafts]
        assert group.kept == rewards.index(max(rewards))
        ties += rewards.count(max(rewards)) > 1
        draft = group.drafts[group.kept].tokens
        special = policy.tokenizer.all_special_ids
        kept = [i for i in draft if i not in special][-KEPT:]
        ids = lambda text: policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = [*before, *ids(group.prompt.question), *ids("\n\n["), *kept, *ids("]"), *ids("<|assistant|>")]
        assert list(group.context) == expected
    assert ties > 0  # two are equally good somewhere, so the rule was needed
    assert {group.kept for group in groups} != {0}
    lengths = {len(draft.tokens) for group in groups for draft in group.drafts}
    assert max(lengths) > KEPT  # something was cut
    assert len({draft.finished for group in groups for draft in group.drafts}) == 2  # and an EOS taken out


@pytest.mark.slow
def test_the_rollout_does_not_depend_on_slots_or_arrival(collect, rollout):
    groups, _ = collect(StubVerifier(delay=0.0), slots=3)
    for ours, theirs in zip(rollout[0], groups, strict=True):
        same(ours, theirs)


@pytest.mark.slow
def test_the_rollout_does_not_depend_on_streaming(collect, rollout):
    """With the barrier no refinement is drawn before the last draft is scored; what is drawn is the same."""
    verifier, at = StubVerifier(), []

    class Watching(StubVerifier):
        def submit(self, candidate, batch):
            at.append(len(self.finished))
            return super().submit(candidate, batch)

    groups, metrics = collect(Watching(), rollout__streamed=False)
    drafts = len(QUESTIONS) * N
    assert min(at[drafts:]) >= drafts  # all drafts were scored
    streamed, streamed_metrics = collect(InstantVerifier(delay=0.0), slots=3)
    assert metrics["perf/stage_overlap_frac"] == 0 < streamed_metrics["perf/stage_overlap_frac"] < 1
    for ours, theirs, others in zip(rollout[0], groups, streamed, strict=True):
        same(ours, theirs)
        same(ours, others)
    ahead, _ = collect(verifier, slots=-3)
    for ours, theirs in zip(rollout[0], ahead, strict=True):
        same(ours, theirs)


@pytest.mark.slow
def test_a_slow_verifier_holds_nothing_up_but_its_own_prompt(collect, rollout, prompts):
    """The drafts of one prompt take long: the others are refined meanwhile, the wait is counted, nothing is lost."""

    others = threading.Event()  # all that the other prompts have to sample was

    class Slow(StubVerifier):
        def submit(self, candidate, batch):
            self._delay = 1.0 if candidate.question == prompts[0].question else 0.0
            if len(self.submitted) + 1 == (len(QUESTIONS) - 1) * (N + G) + N:
                others.set()
            return super().submit(candidate, batch)

        def _grade(self, text, answer, delay):
            assert not delay or others.wait(60)
            return super()._grade(text, answer, 0.5 if delay else 0.0)

    slow = Slow()
    groups, metrics = collect(slow)
    for ours, theirs in zip(rollout[0], groups, strict=True):
        same(ours, theirs)
    assert len(slow.submitted) == len(slow.finished) == len(QUESTIONS) * (N + G)
    assert 0 < metrics["perf/verify_wait_time"] < metrics["perf/rollout_time"]


FAULTY = """
import os, time, zlib

def faulty(prompts, completions, **columns):
    way = zlib.crc32(completions[0].encode()) % 12
    if way == 0:
        os._exit(3)  # the worker dies
    if way == 1:
        time.sleep(60)  # hangs: killed at the deadline
    if way == 2:
        raise ValueError("broken")
    time.sleep(0.01 * way)  # out of order
    return [float(way)]
"""


@pytest.mark.slow(seconds=10)
def test_a_verifier_that_hangs_dies_and_raises(collect, rollout, tmp_path, monkeypatch):
    """Nothing deadlocks, no sample is lost or scored twice; what has no verdict says why and is never kept."""
    (tmp_path / "faulty_rewards.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    settings = config.RewardsConfig(accuracy=0.0, format=0.0, custom="faulty_rewards:faulty", workers=2, timeout=2.0)
    with Verifier(settings) as verifier:
        groups, metrics = collect(verifier, rewards__custom=settings.custom, rewards__max_error_fraction=1.0)
    plain, _ = rollout
    for group, other in zip(groups, plain, strict=True):
        assert [one.sample_id for one in group.drafts] == list(range(N))
        assert [one.sample_id for one in group.completions] == list(range(G))
        for one, same_draft in zip(group.drafts, other.drafts, strict=True):
            np.testing.assert_array_equal(one.tokens, same_draft.tokens)
        for one in (*group.drafts, *group.completions):
            way = zlib.crc32(one.text.encode()) % 12
            assert one.score.status == {0: "error", 1: "timeout", 2: "error"}.get(way, "ok")
            np.testing.assert_equal(one.score.reward, float(way) if way > 2 else math.nan)
        assert group.kept == selected(group.drafts)
    assert metrics["verifier/timeout_frac"] > 0 and metrics["verifier/error_frac"] > 0


RELATIVE = """
import time, zlib

def relative(prompts, completions, completion_ids, **columns):
    time.sleep(zlib.crc32(completions[0].encode()) % 5 / 100)
    lengths = [len(ids) for ids in completion_ids]
    return [length - sum(lengths) / len(lengths) + place / 100 for place, length in enumerate(lengths)]
"""


def without_seconds(group):
    """Returns a group whose scores do not say how long they took."""
    drafts, completions = (
        tuple(replace(each, score=replace(each.score, seconds=0.0)) for each in samples)
        for samples in (group.drafts, group.completions)
    )
    return replace(group, drafts=drafts, completions=completions)


@pytest.mark.slow
def test_a_custom_reward_sees_each_group_in_the_order_of_its_samples(collect, tmp_path, monkeypatch):
    """Each stage of a prompt is one batch, whatever order its samples are drawn in: a repeated rollout is the same."""
    (tmp_path / "relative_rewards.py").write_text(RELATIVE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = config.RewardsConfig(
        accuracy=0.0, format=0.0, custom="relative_rewards:relative", workers=2, timeout=20.0
    )
    with Verifier(settings) as verifier:
        groups, metrics = collect(verifier, rewards__custom=settings.custom)
        again, _ = collect(verifier, rewards__custom=settings.custom)
        other, _ = collect(verifier, slots=3, rewards__custom=settings.custom)
    assert metrics["verifier/error_frac"] == metrics["verifier/timeout_frac"] == 0
    for group, repeated, differently in zip(groups, again, other, strict=True):
        same(without_seconds(group), without_seconds(repeated))
        same(without_seconds(group), without_seconds(differently))
        for completions in (group.drafts, group.completions):
            lengths = [len(completion.tokens) for completion in completions]
            expected = [length - sum(lengths) / len(lengths) + place / 100 for place, length in enumerate(lengths)]
            assert [completion.score.reward for completion in completions] == pytest.approx(expected)
        assert group.kept == selected(group.drafts)


def test_a_group_does_not_depend_on_the_other_prompts(collect, rollout, prompts):
    """The third of six is the third of three; its randomness comes from its position in the step."""
    groups, _ = collect(wanted=prompts[:3])
    for ours, theirs in zip(rollout[0], groups, strict=False):
        same(ours, theirs)


def test_randomness_comes_from_the_step_the_stage_and_the_position(collect, rollout, prompts):
    groups, _ = collect(step=4)
    assert all(
        (a.drafts[0].text, a.drafts[1].text) != (b.drafts[0].text, b.drafts[1].text)
        for a, b in zip(groups, rollout[0], strict=True)
    )
    twice, _ = collect(wanted=[prompts[0], prompts[0]])  # one row twice in a step is not one group twice
    assert [d.text for d in twice[0].drafts] != [d.text for d in twice[1].drafts]
    assert len({stage_key(0, step, stage).tobytes() for step in range(9) for stage in (0, 1, 2)}) == 27
    assert stage_key(1, 0, 0).tobytes() != stage_key(0, 1, 0).tobytes()


def test_without_drafts_it_is_the_base_algorithm(collect, schedulers, params, prompts):
    """The plain prompt is sampled G times, as by the scheduler alone."""
    groups, metrics = collect(algorithm__num_drafts=0)
    key = stage_key(5, 3, 2)
    with jax.set_mesh(schedulers[3].engine.mesh):
        schedulers[3].start(params, Sampling(1.5))
        for index, prompt in enumerate(prompts):
            schedulers[3].submit(Request(prompt.tokens, index, G, key, LENGTH))
        direct = {(sample.request.index, sample.sample_id): sample for sample in schedulers[3].drain()}
    for index, group in enumerate(groups):
        assert group.drafts == () and group.kept is None
        np.testing.assert_array_equal(group.context, group.prompt.tokens)
        for one in group.completions:
            np.testing.assert_array_equal(one.tokens, direct[index, one.sample_id].tokens)
            assert one.finished == direct[index, one.sample_id].finished
    assert metrics["perf/draft_tokens"] == 0
    assert metrics["perf/completion_tokens"] == sum(len(one.tokens) for one in direct.values())


@pytest.mark.parametrize("nearly_greedy", [{"rollout__top_k": 1}, {"rollout__top_p": 1e-6}])
def test_top_p_and_top_k_bound_what_is_sampled(collect, nearly_greedy):
    """Where only the likeliest token can be drawn, all completions of a prompt are the same."""
    groups, _ = collect(algorithm__num_drafts=0, **nearly_greedy)
    assert [len({one.text for one in group.completions}) for group in groups] == [1] * len(QUESTIONS)


def test_dropping_every_draft_is_the_base_algorithm(collect):
    base, _ = collect(algorithm__num_drafts=0)
    dropped, _ = collect(algorithm__draft_dropout=1.0)
    for ours, theirs in zip(base, dropped, strict=True):
        same(ours, theirs)


def test_dropping_some_drafts_leaves_the_others_alone(collect, rollout):
    base, _ = collect(algorithm__num_drafts=0)
    some, _ = collect(algorithm__draft_dropout=0.5)
    dropped = [not group.drafts for group in some]
    assert 0 < sum(dropped) < len(some)
    for gone, group, plain, full in zip(dropped, some, base, rollout[0], strict=True):
        same(group, plain if gone else full)


def test_metrics_over_two_processes_by_hand():
    """Of 40 + 60 slot steps 30 + 20 drew a token, and in 10 + 35 both stages ran."""
    usages = [Usage(40, 30, mixed_slot_steps=10, pages=8, peak_pages=2), Usage(60, 20, mixed_slot_steps=35, pages=8)]
    nothing = {"groups": {}, "redrawn": 0, "redrawn_equal": 0, "scores": [], "judgements": []}
    make = functools.partial(RolloutPart, **nothing, draft_tokens=7, completion_tokens=9)
    parts = [
        make(usage=usages[0], seconds=3.0, weight_seconds=0.5, waited=0.0),
        make(usage=usages[1], seconds=4.0, weight_seconds=0.25, waited=1.0),
    ]
    assert _usage_metrics(parts) == {
        "perf/weight_sync_time": 0.5,
        "perf/verify_wait_time": 1.0,
        "perf/process_idle_frac": 0.125,
        "perf/draft_tokens": 14,
        "perf/completion_tokens": 18,
        "perf/slot_utilization": 0.5,
        "perf/stage_overlap_frac": 0.45,
        "perf/pages_in_use_frac": 0.125,
        "perf/preempted_samples": 0,
    }


def test_tokens_of_both_stages_are_counted(rollout):
    groups, metrics = rollout
    drafts = [one for group in groups for one in group.drafts]
    completions = [one for group in groups for one in group.completions]
    assert metrics["perf/draft_tokens"] == sum(len(one.tokens) for one in drafts)
    assert metrics["perf/completion_tokens"] == sum(len(one.tokens) for one in completions)
    assert 0 <= metrics["perf/verify_wait_time"] < metrics["perf/rollout_time"]
    assert metrics["verifier/error_frac"] == 0


@pytest.mark.parametrize("status", ["error", "timeout"])
def test_a_verifier_that_fails_stops_the_run(collect, status):
    wanted = {"algorithm__num_drafts": 0, "rewards__max_error_fraction": 0.5}
    with pytest.raises(VerifierError, match=r"of 24 gradings (24 timed out|0 timed out, 24 failed)"):
        collect(StubVerifier(status, delay=0.0), **wanted)
    groups, metrics = collect(StubVerifier(status, delay=0.0), **wanted | {"rewards__max_error_fraction": 1.0})
    assert len(groups) == len(QUESTIONS) and metrics[f"verifier/{status}_frac"] == 1


def test_a_rollout_that_is_preempted_lets_the_other_processes_go(monkeypatch, renderer, prompts):
    """Those of its team wait for it to finish, and those of other teams for its part."""

    def preempted(*_):
        raise Preempted

    monkeypatch.setattr("igrpo_jax.learning.rollout.sample_and_score", preempted)
    sent, gather = [], exchange.all_gather_parts
    monkeypatch.setattr(exchange, "all_gather_parts", lambda own, prompts: sent.append(own) or gather(own, prompts))
    ended, nothing = [], lambda *_: ()
    scheduler = SimpleNamespace(start=nothing, positions=nothing, finish=lambda: ended.append(True))
    with pytest.raises(Preempted):
        Rollout(settings(), renderer, scheduler, StubVerifier()).collect({}, 1, lambda redraw: prompts)
    assert ended == [True] and sent == [None]


class SilentJudge(StubVerifier):
    """A verifier that has no verdict on any draft."""

    def _grade(self, text, answer, delay):
        return Score(math.nan, {"judge": math.nan}, None, "invalid", detail="no reply")


def test_drafts_without_a_verdict_are_not_shown(collect):
    wanted = {"rewards__max_error_fraction": 1.0}
    groups, metrics = collect(SilentJudge(delay=0.0), **wanted)
    base, _ = collect(SilentJudge(delay=0.0), algorithm__num_drafts=0, **wanted)
    for group, plain in zip(groups, base, strict=True):
        assert group.kept is None and len(group.drafts) == N
        np.testing.assert_array_equal(group.context, group.prompt.tokens)
        assert [one.text for one in group.completions] == [one.text for one in plain.completions]
    assert metrics["verifier/invalid_frac"] == 1


def test_what_a_reward_is_given(collect, prompts):
    """It gets the row's columns, the question and the very tokens that were sampled, and knows the step."""
    seen = []

    class Watching(StubVerifier):
        def submit(self, candidate, batch):
            assert self.steps == [3]
            seen.append(candidate)
            return super().submit(candidate, batch)

    rows = [replace(prompts[0], columns={"level": 3})]
    groups, _ = collect(Watching(), wanted=rows)
    sampled = {one.tokens.tobytes() for one in (*groups[0].drafts, *groups[0].completions)}
    assert {candidate.tokens.tobytes() for candidate in seen} == sampled
    assert {(c.question, c.answer, c.columns["level"]) for c in seen} == {(QUESTIONS[0], "0", 3)}
    group = groups[0]
    wanted = [("draft", draft.text, None) for draft in group.drafts]
    wanted += [("refine", one.text, group.drafts[group.kept].text) for one in group.completions]
    assert sorted((c.stage, c.text, c.draft) for c in seen) == sorted(wanted)


@pytest.mark.slow
def test_with_the_real_verifier(collect, prompts):
    with Verifier(config.RewardsConfig(workers=1)) as verifier:
        groups, metrics = collect(verifier, wanted=prompts[:2])
    scores = [one.score for group in groups for one in (*group.drafts, *group.completions)]
    assert len(scores) == 2 * (N + G)
    assert {score.status for score in scores} <= {"ok", "unparseable"}
    assert all(set(score.rewards) == {"accuracy", "format"} for score in scores)
    assert metrics["verifier/unparseable_frac"] == sum(score.status == "unparseable" for score in scores) / len(scores)


def drafts_with(rewards):
    none = np.zeros(0)
    return [Completion("draft", i, none, none, True, score=Score(x, {}, None, "ok")) for i, x in enumerate(rewards)]


def selected(drafts, selection="best"):
    return select_draft(drafts, selection, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("rewards", "best"),
    [
        *[([0, 2, 1], 1), ([0, 2, 2], 1), ([1, 1, 1], 0), ([-1, -3], 0), ([0.5], 0), ([0, 0, 1e-3], 2)],
        *[([math.nan, -1, 0], 2), ([0, math.nan], 0), ([math.nan, math.nan], None)],  # NaN: no verdict
    ],
)
def test_the_best_draft(rewards, best):
    assert selected(drafts_with(rewards)) == best


def test_other_drafts_than_the_best():
    """Only drafts with a verdict can be kept: the worst, the first one of equals; the first; any."""
    drafts = drafts_with([math.nan, 2, 1, 1, 3])
    assert selected(drafts, "worst") == 2 and selected(drafts, "first") == 1
    rng = np.random.default_rng(0)
    counts = np.bincount([select_draft(drafts, "random", rng) for _ in range(4000)], minlength=5)
    assert counts[0] == 0 and np.abs(counts[1:] - 1000).max() < 120  # std 27
    for selection in ("worst", "first", "random"):
        assert selected(drafts_with([math.nan] * 2), selection) is None


def test_the_best_draft_by_one_reward():
    """All are wrong; the judge's partial credit chooses, whatever the weighted sum is. A missing value is none."""
    none, judged = np.zeros(0), [0.1, 0.7, math.nan, 0.7]
    scores = [Score(0.0, {"accuracy": 0.0, "judge": value}, None, "ok") for value in judged]
    scores.append(Score(math.nan, {"accuracy": 0.0, "judge": 1.0}, None, "invalid"))
    drafts = [Completion("draft", i, none, none, True, score=score) for i, score in enumerate(scores)]
    rng = np.random.default_rng(0)
    assert select_draft(drafts, "best", rng, "judge") == 1 and select_draft(drafts, "worst", rng, "judge") == 0
    assert select_draft(drafts, "best", rng) == 0
    assert select_draft(drafts[2:3], "best", rng, "judge") is None


def test_a_right_and_a_wrong_draft_can_be_shown_equally_often():
    """One of four drafts with a verdict is right: it is shown in half of the cases, the others in a sixth each."""
    drafts = drafts_with([math.nan, 0.5, 1, 0, 0])
    drafts = [replace(x, score=replace(x.score, rewards={"accuracy": x.score.reward})) for x in drafts]
    rng = np.random.default_rng(0)
    counts = np.bincount([select_draft(drafts, "balanced", rng) for _ in range(6000)], minlength=5)
    assert counts[0] == 0 and abs(counts[2] - 3000) < 160 and np.abs(counts[[1, 3, 4]] - 1000).max() < 120
    alike = [select_draft(drafts[3:], "balanced", rng) for _ in range(50)]
    assert set(alike) == {0, 1}  # no right one is there: any
    assert select_draft(drafts[:1], "balanced", rng) is None


def test_what_the_randomness_of_a_prompt_follows_from():
    """Seed, step, position and redraw; what drops a draft and what selects one are streams of their own."""

    def draw(seed=1, step=2, index=3, redraw=0, tag=stages.DROPOUT):
        runner, progress = SimpleNamespace(_seed=seed, _step=step, _count=6), SimpleNamespace()
        progress.position = StepPosition(index, redraw)
        return stages.StageRunner._rng(runner, progress, tag).random()

    others = [{"seed": 4}, {"step": 4}, {"index": 4}, {"redraw": 1}, {"tag": stages.SELECTION}]
    assert len({draw(), *(draw(**other) for other in others)}) == 6 and draw() == draw()


@pytest.mark.parametrize("right", [True, False])
def test_q_prime_can_say_whether_its_draft_is_right(prompts, right):
    """What {verdict} in refine.instruction stands for."""
    (draft,) = drafts_with([0.5])
    draft.score.rewards["accuracy"] = float(right)
    progress = PromptProgress(prompts[0], StepPosition(0), drafts={2: draft})
    runner = SimpleNamespace(_renderer=SimpleNamespace(with_draft=lambda *shown: shown))
    assert stages.StageRunner._context(runner, progress, 2) == (QUESTIONS[0], draft.tokens, right)


@pytest.mark.parametrize("selection", ["worst", "first", "random"])
def test_the_kept_draft_can_be_another(collect, rollout, renderer, selection):
    """The drafts are the same; what q' shows follows from the seed, the step and the position, not from arrival."""
    groups, _ = collect(algorithm__draft_selection=selection)
    again, _ = collect(StubVerifier(delay=0.0), slots=3, algorithm__draft_selection=selection)
    other, _ = collect(step=4, algorithm__draft_selection=selection)
    for group, repeated, plain in zip(groups, again, rollout[0], strict=True):
        same(group, repeated)
        assert [one.text for one in group.drafts] == [one.text for one in plain.drafts]
        rewards = [one.score.reward for one in group.drafts]
        if selection != "random":
            assert group.kept == (rewards.index(min(rewards)) if selection == "worst" else 0)
        shown = renderer.with_draft(group.prompt.question, group.drafts[group.kept].tokens)
        np.testing.assert_array_equal(group.context, shown)
    assert [group.kept for group in groups] != [group.kept for group in rollout[0]]
    if selection == "random":
        assert len({group.kept for group in groups}) > 1
        assert [group.kept for group in groups] != [group.kept for group in other]


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "streamed"), [(16, True), (3, True), (16, False), (-3, True)])
def test_drafting_can_end_at_the_first_success(collect, rollout, slots, streamed):
    """The largest reward is 2. The drafts are those of a full Stage 1, up to the first with 2; the rest is equal."""
    verifier = StubVerifier(delay=0.01)
    wanted = {"algorithm__draft_early_stop": True, "rollout__streamed": streamed}
    groups, metrics = collect(verifier, slots=slots, **wanted)
    drawn = []
    for group, full in zip(groups, rollout[0], strict=True):
        rewards = [one.score.reward for one in full.drafts]
        drawn.append(rewards.index(2) + 1 if 2 in rewards else N)
        same(group, replace(full, drafts=full.drafts[: drawn[-1]]))
    assert len(set(drawn)) > 2 and N in drawn  # some end early, some never
    assert len(verifier.submitted) == sum(drawn) + len(QUESTIONS) * G  # the others were not drawn at all
    assert metrics["perf/draft_tokens"] < rollout[1]["perf/draft_tokens"]


class Inaccurate(StubVerifier):
    """Finds every answer wrong, whatever its reward, so that dynamic sampling by accuracy filters every group out."""

    def _grade(self, text, answer, delay):
        return replace(super()._grade(text, answer, delay), rewards={"accuracy": 0.0})


class Held:
    """Gives no score of some texts before others are scored.

    Args:
        held: by answer, texts that wait.
        until: by answer, another (or the same) answer, and how many texts with that one must be scored first.
    """

    def __init__(self, held, until, **settings):
        super().__init__(**settings)
        self._held, self._until = held, until
        self._scored, self._news = Counter(), threading.Condition()
        self.waited = []  # of each text that waited, whether the others came

    def _grade(self, text, answer, delay):
        if text in self._held.get(answer, ()):
            other, count = self._until[answer]
            with self._news:
                self.waited.append(self._news.wait_for(lambda: self._scored[other] >= count, 20))
        score = super()._grade(text, answer, delay)
        with self._news:
            self._scored[answer] += 1
            self._news.notify_all()
        return score


class HeldInaccurate(Held, Inaccurate):
    pass


@pytest.mark.parametrize("redraws", [0, 1])
def test_a_prompt_is_refined_once_no_other_draft_can_be_the_best(collect, rollout, prompts, redraws):
    """Drafts after the first one with the largest reward, 2, are scored last of all. Nothing that comes out changes.

    With redraws a group is thrown away only once all its drafts are scored: they are counted.
    """
    by_answer = [replace(prompt, answer=prompt.question) for prompt in prompts]
    wanted = {"wanted": by_answer, "fresh": lambda redraw: prompts, "algorithm__max_redraws": redraws}
    expected, metrics = collect(Inaccurate(delay=0.0), rollout__streamed=False, **wanted)
    certain = [group for group in rollout[0] if group.drafts[group.kept].score.reward == 2 and group.kept + 1 < N]
    held = {group.prompt.question: [one.text for one in group.drafts[group.kept + 1 :]] for group in certain}
    until = {question: (question, N - len(texts) + G) for question, texts in held.items()}
    verifier = HeldInaccurate(held, until, delay=0.0)
    groups, repeated = collect(verifier, **wanted)
    assert len(held) > 2 and len(verifier.waited) == sum(map(len, held.values())) and all(verifier.waited)
    for ours, theirs in zip(groups, expected, strict=True):
        same(ours, theirs)
    assert repeated.get("redraw/groups", 0) == redraws * len(QUESTIONS)
    for name in ("perf/draft_tokens", "perf/completion_tokens"):
        assert repeated[name] == metrics[name]


@pytest.mark.parametrize(
    ("rewards", "known"),
    [
        *[({0: 2}, True), ({1: 2}, False), ({0: 1, 1: 2}, True), ({0: 1, 2: 2}, False), ({0: 1, 1: 1}, False)],
        *[({0: math.nan, 1: 2}, True), ({0: math.nan}, False), ({}, False), ({1: 2, 3: 2}, False)],
    ],
)
def test_when_the_best_draft_is_known(rewards, known):
    """2 is the largest reward; of several such drafts the first one is the best, so all before it must be scored."""
    drafts = dict(zip(rewards, drafts_with(rewards.values()), strict=True))
    assert best_is_known(drafts, "reward", 2.0) == known
    assert not best_is_known(drafts, "reward", math.inf)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (0.1, 0.2, 0.3), (0.3, 0.3, 0.1), (0.0, 0.7, 0.1)])
def test_the_largest_reward_is_what_a_perfect_completion_earns(weights):
    """To the last digit, because a draft that earns it is the best one. Rewards of one's own have no bound."""
    named = dict.fromkeys(REWARDS, 1.0) | dict(zip(("accuracy", "format", "judge"), weights, strict=True))
    judge = config.JudgeConfig(weight=named.pop("judge"))
    rewards = config.RewardsConfig(**named, judge=judge, custom="module:length", overlong_cache=4)
    own = replace(rewards, custom_weight=0.0)  # computed and logged only
    rules = rules_of(own, max_completion=20)
    perfect = score(Candidate("<think>a</think><answer>7</answer>", "7", tokens=np.zeros(9, np.int32)), rules)
    judged = replace(perfect, rewards=perfect.rewards | {"judge": 1.0})
    assert largest_value(own, "reward") == total(judged, rules.weights | {"judge": judge.weight}).reward
    assert largest_value(rewards, "reward") == math.inf
    assert [largest_value(rewards, name) for name in ("accuracy", "format", "judge")] == [1.0] * 3
    assert [largest_value(rewards, name) for name in ("overlong", "length")] == [math.inf] * 2
    assert largest_value(replace(rewards, custom="module:format"), "format") == math.inf


def test_a_draft_without_a_verdict_ends_nothing(collect):
    wanted = {"rewards__max_error_fraction": 1.0, "algorithm__draft_early_stop": True}
    groups, _ = collect(SilentJudge(delay=0.0), **wanted)
    assert all(len(group.drafts) == N and group.kept is None for group in groups)


class Hard(StubVerifier):
    """Finds a third of the answers right, whatever their reward; it counts what it grades."""

    def _grade(self, text, answer, delay):
        score = super()._grade(text, answer, delay)
        return replace(score, rewards={"accuracy": float(zlib.crc32(text.encode()) % 3 == 0)})


UNSOLVED = {"algorithm__draft_when": "unsolved", "algorithm__train_drafts": True, "algorithm__num_drafts": 2}


def by_position(groups, firsts):
    """Groups that follow one another at a position, in lists that begin with the prompts `firsts`."""
    starts = [i for i, group in enumerate(groups) if any(group.prompt is first for first in firsts)]
    return [groups[start:stop] for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True)]


@pytest.mark.parametrize("streamed", [True, False])
def test_only_prompts_without_a_right_draft_are_refined(collect, prompts, streamed):
    """N = 2, G = 4: a position has 6 completions: 2 drafts and 4 refinements, or the drafts of three prompts.

    Whatever is solved, 6 x 6 completions are sampled. What comes out does not depend on slots or arrival, and the
    first prompts' drafts and refinements are those of a run that refines all.
    """
    fresh = lambda redraw: [
        replace(prompt, id=f"{prompt.id}, {redraw}") for prompt in prompts[redraw:] + prompts[:redraw]
    ]
    wanted = {**UNSOLVED, "rollout__streamed": streamed, "fresh": fresh}
    verifier = Hard()
    groups, metrics = collect(verifier, **wanted)
    again, _ = collect(Hard(delay=0.0), slots=3, **wanted)
    every, _ = collect(Hard(), algorithm__num_drafts=2)
    assert len(again) == len(groups)
    for ours, theirs in zip(groups, again, strict=True):
        same(ours, theirs)
    chains = by_position(groups, prompts)
    assert len(chains) == len(prompts)
    for index, (chain, full) in enumerate(zip(chains, every, strict=True)):
        unsolved = not any(draft.score.is_right for draft in full.drafts)
        same(chain[0], full if unsolved else replace(full, completions=(), kept=None, context=full.prompt.tokens))
        expected = [] if unsolved else [fresh(1)[index], fresh(2)[index]]
        assert [group.prompt.id for group in chain[1:]] == [prompt.id for prompt in expected]
        # Of fresh prompts none can be refined any more: 2 or 0 completions are left.
        assert all(len(group.drafts) == 2 and not group.completions for group in chain[1:])
        assert all(group.kept is None and group.context is group.prompt.tokens for group in chain[1:])
    assert len({len(chain) for chain in chains}) == 2  # some are refined, some not
    refined = sum(len(chain) == 1 for chain in chains)
    assert len(verifier.submitted) == metrics["unsolved/completions"] == len(prompts) * (2 + G)
    assert (metrics["unsolved/prompts"], metrics["unsolved/refined"]) == (len(groups), refined)


class HeldHard(Held, Hard):
    pass


def test_a_solved_prompt_gives_its_position_up_at_once(collect, prompts):
    """Its other draft is scored last, and so are those of the first fresh prompt. Nothing that comes out changes."""
    named = [[replace(prompt, answer=f"{redraw} {prompt.question}") for prompt in prompts] for redraw in range(3)]
    wanted = UNSOLVED | {"wanted": named[0], "fresh": named.__getitem__}
    expected, metrics = collect(Hard(delay=0.0), rollout__streamed=False, **wanted)
    chains = [chain for chain in by_position(expected, named[0]) if len(chain) == 3]
    held, until = {}, {}
    for solved, first, second in chains:
        right = next(draft for draft in solved.drafts if draft.score.is_right)
        held[solved.prompt.answer] = [draft.text for draft in solved.drafts if draft is not right]
        held[first.prompt.answer] = [draft.text for draft in first.drafts]
        until |= dict.fromkeys((solved.prompt.answer, first.prompt.answer), (second.prompt.answer, 2))
    verifier = HeldHard(held, until, delay=0.0)
    groups, repeated = collect(verifier, **wanted)
    assert len(verifier.waited) == 3 * len(chains) > 3 and all(verifier.waited)
    assert len(groups) == len(expected)
    for ours, theirs in zip(groups, expected, strict=True):
        same(ours, theirs)
    for name in ("perf/draft_tokens", "perf/completion_tokens", "unsolved/prompts"):
        assert repeated[name] == metrics[name]


class Easy(InstantVerifier):
    """Finds every answer right."""

    def _grade(self, text, answer, delay):
        return replace(super()._grade(text, answer, delay), rewards={"accuracy": 1.0})


def test_no_dispatch_waits_for_scores_that_bring_nothing(collect, prompts, monkeypatch):
    """Of a prompt that has moved on, and of a fresh one, which is not refined whatever its drafts are."""
    awaited = []
    monkeypatch.setattr(scoring, "_wait_for_all", lambda scores, patience: awaited.append(len(scores)) or 0.0)
    collect(Easy(delay=0.0), fresh=lambda redraw: prompts, **UNSOLVED)
    assert sum(awaited) <= 2 * len(prompts)  # the drafts of the first prompts
    collect(InstantVerifier(delay=0.0), algorithm__num_drafts=0)
    assert sum(awaited) <= 2 * len(prompts)
    collect(InstantVerifier(delay=0.0))
    assert sum(awaited) > 2 * len(prompts)


def test_a_position_that_drafts_all_its_completions(collect, prompts):
    """Every answer is right: three prompts at each position, and the update has no refinements at all."""
    groups, metrics = collect(Easy(delay=0.0), fresh=lambda redraw: prompts, **UNSOLVED)
    assert [group.prompt for group in groups] == [prompt for prompt in prompts for _ in range(3)]
    assert metrics["unsolved/completions"] == 6 * len(prompts) and metrics["unsolved/refined"] == 0
    assert metrics["perf/completion_tokens"] == 0
    texts = {group.drafts[0].text for group in groups[:3]}
    assert len(texts) == 3  # one prompt, three times with randomness of its own
    chosen = settings(**UNSOLVED)
    assert [len(own) for own in credit.advantages(groups, chosen).refinements] == [0] * len(groups)


@pytest.mark.parametrize(
    ("fraction", "right", "solved"),
    [
        *[(0.0, [0, 0], False), (0.0, [0, 1], True), (0.0, [math.nan, 0], False), (0.0, [2, 2], True)],
        *[(0.5, [1, 0], True), (0.6, [1, 0], False), (1.0, [1, 0], False), (1.0, [1, 1], True)],
        *[(0.0, [], False), (0.5, [1], True), (0.6, [1], False), (0.0, [0], False)],  # of 2, some are not scored yet
    ],
)
def test_which_prompts_are_solved(fraction, right, solved):
    """One right draft is enough, or a fraction of all N = 2 of them."""
    drafts = [
        replace(draft, score=replace(draft.score, rewards={"accuracy": x}))
        for draft, x in zip(drafts_with(right), right, strict=True)
    ]
    assert is_solved(drafts, settings(algorithm__num_drafts=2, algorithm__solved_fraction=fraction).algorithm) == solved


VERIFYING = {
    "algorithm__second_stage": "verify",
    "algorithm__train_drafts": True,
    "algorithm__draft_selection": "random",
}


class Marking(StubVerifier):
    """Solutions earn what they always do, 0 to 2; the verdict of a verification is its text's, "1" for an odd one."""

    def _grade(self, text, answer, delay):
        score = super()._grade(text, answer, delay)
        if answer == "sum":
            return score
        verdict = str(zlib.crc32(text.encode()) % 2)
        accuracy = float(verdict == answer)
        return Score(accuracy, {"accuracy": accuracy}, verdict, "ok")


@pytest.mark.parametrize("streamed", [True, False])
def test_solutions_are_verified_where_some_are_right_and_some_wrong(collect, rollout, prompts, renderer, streamed):
    """The drafts are those of iGRPO. A verification is graded against the verdict on the solution that it is shown."""
    asked = [replace(prompt, answer="sum") for prompt in prompts]
    verifier = Marking(delay=0.01)
    groups, metrics = collect(verifier, wanted=asked, rollout__streamed=streamed, **VERIFYING)
    again, _ = collect(Marking(delay=0.0), wanted=asked, slots=3, **VERIFYING)
    graded = []
    for group, repeated, plain in zip(groups, again, rollout[0], strict=True):
        same(group, repeated)
        assert [x.text for x in group.drafts] == [x.text for x in plain.drafts]
        assert {group.reference_answer(draft) for draft in group.drafts} == {"sum"}
        is_right = [draft.score.is_right for draft in group.drafts]
        if len(set(is_right)) == 1:
            assert group.completions == () and group.kept is None and group.context is group.prompt.tokens
            continue
        shown, verdict = group.drafts[group.kept], "1" if is_right[group.kept] else "0"
        np.testing.assert_array_equal(group.context, renderer.with_draft(group.prompt.question, shown.tokens))
        assert [(x.stage, x.sample_id) for x in group.completions] == [("verify", i) for i in range(G)]
        assert all(x.score.is_right == (x.score.extracted == verdict) for x in group.completions)
        assert {group.reference_answer(x) for x in group.completions} == {verdict}
        assert {(x.text, shown.text) for x in group.completions} <= set(verifier.shown)
        assert group.prompt.answer == "sum"
        graded += [(x.text, verdict) for x in group.completions]
    assert 0 < len(graded) < G * len(prompts) and {verdict for _, verdict in graded} == {"0", "1"}
    assert sorted(call for call in verifier.submitted if call[1] != "sum") == sorted(graded)
    of_verifications = sum(len(x.tokens) for group in groups for x in group.completions)
    assert metrics["perf/completion_tokens"] == of_verifications


@pytest.mark.parametrize(
    ("right", "verifies"),
    [([0, 1], True), ([1, 1], False), ([0, 0], False), ([math.nan, 1], False), ([math.nan, 0, 1], True), ([1], False)],
)
def test_which_prompts_are_verified(right, verifies):
    drafts = [
        replace(draft, score=replace(draft.score, rewards={"accuracy": x}))
        for draft, x in zip(drafts_with(right), right, strict=True)
    ]
    assert needs_verification(drafts) == verifies


@pytest.mark.parametrize(
    ("solution_right", "text", "accuracy"),
    [
        (True, "<think>It adds up.</think><answer>1</answer>", 1),
        (True, "<answer>0</answer>", 0),
        (False, "The sum is off, so $\\boxed{0}$", 1),
        (False, "<answer>1</answer>", 0),
        (False, "<answer>7</answer>", 0),
        (True, "it is right", 0),
    ],
)
def test_the_grader_marks_a_verdict(solution_right, text, accuracy):
    """The reference answers 1 and 0 go to the same reward functions as the answer to a problem."""
    rules = rules_of(config.RewardsConfig(format=0.0), LENGTH)
    assert score(Candidate(text, VERDICTS[solution_right]), rules).reward == accuracy


def test_every_draft_can_be_refined(collect, rollout, renderer):
    """N = 4, G = 2: 4 + 8 completions of a prompt are sampled, and of the 8 refinements those of one draft are kept.

    The drafts are those of any run. The kept refinements are on average the best, whatever their draft earned.
    """
    wanted = {"algorithm__draft_selection": "refined", "algorithm__num_generations": 2}
    verifier = StubVerifier()
    groups, metrics = collect(verifier, **wanted)
    again, _ = collect(StubVerifier(delay=0.0), slots=3, **wanted)
    assert verifier.counted == len(verifier.submitted) == len(QUESTIONS) * (N + 2 * N)
    for group, repeated, plain in zip(groups, again, rollout[0], strict=True):
        same(group, repeated)
        assert [draft.text for draft in group.drafts] == [draft.text for draft in plain.drafts]
        shown = renderer.with_draft(group.prompt.question, group.drafts[group.kept].tokens)
        np.testing.assert_array_equal(group.context, shown)
        assert [one.sample_id for one in group.completions] == [2 * group.kept, 2 * group.kept + 1]
        assert {(one.text, group.drafts[group.kept].text) for one in group.completions} <= set(verifier.shown)
    assert [group.kept for group in groups] != [group.kept for group in rollout[0]]
    single, _ = collect(algorithm__num_generations=2)
    assert np.mean([group.rewards for group in groups]) > np.mean([group.rewards for group in single])
    tokens = sum(len(one.tokens) for group in groups for one in group.completions)
    assert metrics["perf/completion_tokens"] > 2 * tokens  # those left out were sampled too
    unknown, _ = collect(SilentJudge(delay=0.0), rewards__max_error_fraction=1.0, **wanted)
    assert all(group.kept is None and len(group.completions) == 2 for group in unknown)


class OneReward(StubVerifier):
    """Has 0 to 1, or no value, in one reward, and the same weighted sum for every text if there is a `total`."""

    def __init__(self, total=None):
        super().__init__(delay=0.0)
        self.total = total

    def _grade(self, text, answer, delay):
        value = (0.0, 0.5, 1.0, math.nan)[zlib.crc32(text.encode()) % 4]
        return Score(value if self.total is None else self.total, {"accuracy": value}, text[:1], "ok")


def test_the_kept_draft_can_be_the_best_by_one_reward(collect):
    """The weighted sums of all drafts are equal, and by them the first would be kept."""
    groups, _ = collect(OneReward(total=1.0), algorithm__draft_metric="accuracy")
    for group in groups:
        values = [draft.score.rewards["accuracy"] for draft in group.drafts]
        assert group.kept == int(np.nanargmax(values))
    assert len({group.kept for group in groups}) > 1


class HeldOneReward(Held, OneReward):
    pass


def test_a_prompt_is_refined_once_its_best_draft_by_one_reward_is_known(collect, prompts):
    """The largest accuracy is 1, whatever its weight; drafts after one that has it are scored last of all."""
    wanted = {"wanted": [replace(prompt, answer=prompt.question) for prompt in prompts], "rewards__accuracy": 0.5}
    wanted["algorithm__draft_metric"] = "accuracy"
    expected, _ = collect(OneReward(), rollout__streamed=False, **wanted)
    certain = [group for group in expected if group.drafts[group.kept].score.rewards["accuracy"] == 1]
    held = {group.prompt.question: [one.text for one in group.drafts[group.kept + 1 :]] for group in certain}
    verifier = HeldOneReward(held, {question: (question, N - len(texts) + G) for question, texts in held.items()})
    groups, _ = collect(verifier, **wanted)
    assert len(verifier.waited) == sum(map(len, held.values())) > 2 and all(verifier.waited)
    for ours, theirs in zip(groups, expected, strict=True):
        same(ours, theirs)


def test_the_refined_draft_can_be_chosen_by_one_reward(collect):
    """The reward alone says which drafts are refined and which is kept, as it does where there is no other one."""
    wanted = {"algorithm__draft_selection": "refined", "algorithm__num_generations": 2}
    groups, _ = collect(OneReward(total=1.0), algorithm__draft_metric="accuracy", **wanted)
    alone, _ = collect(OneReward(), **wanted)
    assert [group.kept for group in groups] == [group.kept for group in alone]
    for group, other in zip(groups, alone, strict=True):
        assert [one.text for one in group.completions] == [one.text for one in other.completions]


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        # Of three drafts, two refinements each: the best mean, the first of equals; without a verdict they don't count.
        *[([0, 1, 1, 1, 0, 0], 3), ([0, 0, 0, 0, 0, 0], 0), ([0, 1, 1, 0, 0, 0], 0)],
        *[([0, 1, math.nan, 1, 1, 1], 3), ([math.nan, math.nan, 0, 0, math.nan, 0], 3), ([math.nan] * 6, 0)],
    ],
)
def test_the_draft_with_the_best_refinements(rewards, kept):
    """The drafts are numbers 0, 3 and 5 of those sampled: the others have no verdict."""
    prompt = Prompt("", 0, "", "", np.zeros(1, np.int32))
    contexts = {number: np.array([number]) for number in (0, 3, 5)}
    progress = PromptProgress(
        prompt, StepPosition(0), contexts=contexts, completions=dict(enumerate(drafts_with(rewards)))
    )
    left_out = keep_best_refined(progress)
    first = 2 * list(contexts).index(kept)
    assert (progress.kept, progress.context.tolist(), list(progress.completions)) == (kept, [kept], [first, first + 1])
    assert [one.sample_id for one in left_out] == [i for i in range(6) if i not in (first, first + 1)]


def test_every_other_step_can_do_without_drafts(collect, rollout):
    """Step 3 is the base algorithm, step 4 has drafts; each has the samples that it would have alone."""
    for step, drafts in ((3, 0), (4, N)):
        groups, _ = collect(step=step, algorithm__alternate=True)
        alone, _ = collect(step=step, algorithm__num_drafts=drafts)
        for ours, theirs in zip(groups, alone, strict=True):
            same(ours, theirs)
    algorithm = settings(algorithm__alternate=True).algorithm
    assert [algorithm.drafts_in(step) for step in (1, 2, 3)] == [0, N, 0]
    assert [algorithm.batches_until(step) for step in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [settings().algorithm.batches_until(step) for step in range(3)] == [0, 1, 2]


class Unsolvable(StubVerifier):
    """Some questions earn the same whatever the answer; for the others hardly two answers earn the same."""

    def __init__(self, questions, **settings):
        super().__init__(**settings)
        self.questions = questions

    def submit(self, candidate, batch):
        if candidate.question not in self.questions:
            return super().submit(candidate, batch)
        self.submitted.append((candidate.text, candidate.answer))
        return self._pool.submit(lambda: Score(0.0, {"accuracy": 0.0}, None, "ok"))

    @staticmethod
    def reward(text):
        return zlib.crc32(text.encode()) % 997 / 997


@pytest.mark.parametrize("streamed", [True, False])
def test_groups_without_a_signal_are_drawn_again(collect, prompts, streamed):
    """Positions 0 and 3 are drawn again: 0 gets a prompt with a signal, 3 gets one without, and then one with a signal.

    What comes out does not depend on slots or arrival, and the groups of other positions are what they were.
    """
    rounds = {1: [prompts[i] for i in (1, 5, 5, 0, 5, 5)], 2: [prompts[i] for i in (0, 0, 0, 4, 0, 0)]}
    wanted = {"fresh": rounds.get, "algorithm__max_redraws": 3, "rollout__streamed": streamed}
    unsolvable = {QUESTIONS[0], QUESTIONS[3]}
    verifier = Unsolvable(unsolvable)
    before, unwanted = collect(Unsolvable(unsolvable))
    groups, metrics = collect(verifier, **wanted)
    again, _ = collect(Unsolvable(unsolvable, delay=0.0), slots=3, **wanted)
    for ours, theirs in zip(groups, again, strict=True):
        same(ours, theirs)
    assert [group.prompt for group in groups] == [prompts[i] for i in (1, 1, 2, 4, 4, 5)]
    for index in (1, 2, 4, 5):
        same(groups[index], before[index])
    for index, twin in ((0, 1), (3, 4)):  # a redraw has randomness of its own
        assert [draft.text for draft in groups[index].drafts] != [draft.text for draft in groups[twin].drafts]
        assert len(set(groups[index].rewards)) > 1
    assert (metrics["redraw/groups"], metrics["redraw/exhausted"]) == (3, 0)
    assert verifier.counted == len(verifier.submitted) == (len(QUESTIONS) + 3) * (N + G)
    for name, stage in (("draft", "drafts"), ("completion", "completions")):
        tokens = sum(len(one.tokens) for group in groups for one in getattr(group, stage))
        assert metrics[f"perf/{name}_tokens"] > tokens  # those thrown away were sampled too
    assert "redraw/groups" not in unwanted


class AllWrong(StubVerifier):
    """Grades every completion as wrong, or of some questions as right; formats differ, so that rewards do too."""

    def __init__(self, solved=()):
        super().__init__(delay=0.0)
        self._solved = solved

    def submit(self, candidate, batch):
        rewards = {
            "accuracy": float(candidate.question in self._solved),
            "format": zlib.crc32(candidate.text.encode()) % 997,
        }
        if candidate.question == QUESTIONS[2]:  # some right, some wrong, and rewards that are equal
            rewards["accuracy"] = float(rewards["format"] % 2)
            rewards["format"] = 1 - rewards["accuracy"]
        return self._pool.submit(lambda: Score(sum(rewards.values()), rewards, None, "ok"))


@pytest.mark.parametrize("metric", [None, "accuracy", "reward", "format"])
def test_dynamic_sampling_looks_at_the_accuracy_and_not_at_the_reward(collect, prompts, metric):
    """Three questions: all wrong, all right, and some right with equal rewards; red where the sum is filtered."""
    three = prompts[:3]
    fresh = lambda redraw: [prompts[4]] * 3
    changes = {"algorithm__max_redraws": 1, "algorithm__filter_groups_metric": metric, "prompts_per_step": 3}
    groups, metrics = collect(AllWrong({QUESTIONS[1]}), wanted=three, fresh=fresh, **changes)
    by_accuracy = metric in (None, "accuracy")
    redrawn = {"reward": [2], "format": []}.get(metric, [0, 1])
    expected = [prompts[4] if index in redrawn else prompt for index, prompt in enumerate(three)]
    assert [group.prompt for group in groups] == expected
    assert metrics["redraw/groups"] == len(redrawn)
    assert metrics["redraw/exhausted"] == (2 if by_accuracy else 0)  # the fresh prompts are all wrong as well
    sampled = 3 + len(redrawn)
    assert metrics["redraw/filtered_frac"] == (len(redrawn) + metrics["redraw/exhausted"]) / sampled
    assert metrics["redraw/equal_reward_frac"] == 1 / sampled
    rewards = np.stack([filtering.rewards_after_filtering(group, settings(**changes)) for group in groups])
    assert np.isnan(rewards).all(axis=1).tolist() == [by_accuracy, by_accuracy, False]
    advantages = objectives.group_advantages(rewards, "group")
    assert not advantages[2].any() or metric == "reward"  # equal rewards have no advantage, whatever is filtered
    assert advantages[:2].any() != by_accuracy
    untouched = settings(**changes | {"algorithm__max_redraws": 0})
    assert all(np.isfinite(filtering.rewards_after_filtering(group, untouched)).all() for group in groups)


def test_redraws_end_on_an_unsolvable_set(renderer, schedulers, params, prompts, caplog):
    """Redraws are bounded and counted every step, and the warning comes once."""
    verifier = Unsolvable(set(QUESTIONS), delay=0.0)
    with jax.set_mesh(schedulers[16].engine.mesh):
        rollout = Rollout(settings(algorithm__max_redraws=2), renderer, schedulers[16], verifier)
        for step in (1, 2):
            groups, metrics = rollout.collect(params, step, lambda redraw: prompts[redraw:] + prompts[:redraw])
            assert (metrics["redraw/groups"], metrics["redraw/exhausted"]) == (2 * len(prompts), len(prompts))
            assert [group.prompt for group in groups] == [*prompts[2:], *prompts[:2]]  # the last redraw stays
    assert len(verifier.submitted) == 2 * 3 * len(prompts) * (N + G)
    assert (
        len(
            [
                one
                for one in caplog.records
                if "after 2 redraws each, the completions of 6 of 6 groups" in one.getMessage()
            ]
        )
        == 1
    )


def test_proposition_3_1():
    """Of N = 4 drafts that are each right with p = .3, the best is right with 1 - .7^4 = .7599.

    5,000 groups: std .006. A draft picked blindly would be right with .3, the best of 3 with .657, of 5 with .832.
    """
    rng = np.random.default_rng(0)
    groups = (rng.random((5000, 4)) < 0.3).astype(float)
    best = [rewards[selected(drafts_with(rewards))] for rewards in groups]
    assert np.mean(best) == pytest.approx(1 - 0.7**4, abs=0.02)
