"""Continuous batching: transformers' texts, whatever else is being served; blocks that come back; drafts that change nothing.

Planted faults this file was seen to catch, one at a time:
a draft accepted unseen; the module one hidden state behind; blocks not given back when a request is cancelled; a request that
overtakes; a whole prompt found in the cache, so that nothing is computed; beginnings known after params have changed; digests
without what came before; a block freed while another sequence has it; a graph for every length.
"""

import collections
import gc
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

import dsv3
from dsv3 import generation
from dsv3.blocks import Blocks, digests
from dsv3.engine import Engine
from dsv3.generation import generate
from dsv3.kernels.rms_norm import rms_norm
from dsv3.model import layers, make_block
from dsv3.nn.mtp import mtp_input
from dsv3.nn.rope import rope_tables
from dsv3.nn.vocab import embed, head
from dsv3.sampling import Sampling
from dsv3.transform import compile_count

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = np.load(GOLDENS / "generate.npz")
CFG = dsv3.TINY.replace(vocab_size=53, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
                        num_attention_heads=2, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
                        v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, initializer_range=0.3)


@pytest.fixture(scope="module")
def params():
    return dsv3.init(CFG, seed=4)


@pytest.fixture(scope="module")
def engine(params):
    """One for the tests that leave it idle: 3 rows, 15 blocks of 4, chunks of 32."""
    return Engine(params, CFG, max_batch=3, max_length=50, cache_tokens=60, block_size=4, chunk=32, eos_token_ids=(1,))


def drain(engine, before_step=None):
    """{request: its events} of everything that is left to do."""
    events = collections.defaultdict(list)
    for i in range(10000):
        if engine.idle:
            return events
        if before_step:
            before_step(i)
        for event in engine.step():
            events[event.request].append(event)
    raise AssertionError("the engine does not come to an end")


def text(events):
    return [event.token for event in events]


def prompts_of(seed, n, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, CFG.vocab_size, rng.integers(1, longest)).tolist() for _ in range(n)]


# -- texts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["base", "yarn", "no_q_lora"])
def test_greedy_text_of_transformers(case):
    """64 tokens, alone and in a ragged batch of four (goldens/make_generate.py)."""
    params, cfg = dsv3.from_hf(GOLDENS / "hf" / case)
    rows = [[t for t in row if t >= 0] for row in GOLDEN[f"{case}_prompts"].tolist()]
    wanted = GOLDEN[f"{case}_new"].tolist()
    assert generate(params, rows[:1], cfg=cfg, max_new_tokens=64) == wanted[:1]
    assert generate(params, rows[1:], cfg=cfg, max_new_tokens=64) == wanted[1:]


def test_company_changes_nothing(params, engine):
    """Requests that come and go, with drafts or without, get the text they get alone: greedy and drawn."""
    prompts = prompts_of(0, 12)
    samplings = [Sampling(max_new_tokens=10, temperature=1.0 * (i % 2), top_p=0.9, seed=i, ignore_eos=True,
                          repetition_penalty=1.2 if i % 3 == 0 else 1.0) for i in range(12)]
    alone = []
    for prompt, sampling in zip(prompts, samplings):
        request = engine.submit(prompt, sampling)
        alone.append(text(drain(engine)[request]))
    drafting = Engine(params, CFG, max_batch=3, max_length=50, cache_tokens=80, block_size=4, chunk=32, speculative=True)
    for other in (engine, drafting):
        requests = {}

        def arrive(i, other=other, requests=requests):
            if i % 2 == 0 and len(requests) < 12:
                n = len(requests)
                requests[other.submit(prompts[n], samplings[n])] = n

        arrive(0)
        events = drain(other, arrive)
        assert [text(events[r]) for r in requests] == alone
        assert other.stats.free_blocks == other.stats.blocks
    assert drafting.stats.drafted > 50


def test_hundreds_of_drafted_texts(params):
    """300 prompts: the same ids with drafts as without; how often a draft is right is counted rightly."""
    prompts = prompts_of(1, 300, 12)
    plain = generate(params, prompts, cfg=CFG, max_new_tokens=7)
    engine = Engine(params, CFG, max_batch=16, max_length=32, speculative=True)
    requests = [engine.submit(p, Sampling(max_new_tokens=7)) for p in prompts]
    events = drain(engine)
    assert [text(events[r]) for r in requests] == plain
    stats = engine.stats
    assert stats.generated_tokens == 2100 and stats.prompt_tokens == sum(map(len, prompts))
    assert 0 < stats.accepted < stats.drafted == stats.steps
    # a request's first token comes with its prompt, each step gives one more, a right draft another, but for the last that
    # a text has no room for
    assert 1800 <= stats.steps + stats.accepted <= 1800 + 300


def test_drafts_are_right_when_the_module_knows(params):
    """An MTP module whose block adds nothing and whose input is the next token's embedding; a model that repeats one pattern."""
    W, D = CFG.vocab_size, CFG.hidden_size
    assert W <= 2 * D
    cfg = CFG.replace(vocab_size=D, num_hidden_layers=1)
    params = dsv3.tree.tree_map(lambda leaf: leaf * 0, dsv3.init(cfg, seed=0))
    one = np.eye(D, dtype=np.float32)
    params["embed"], params["head"] = Tensor(one), Tensor(np.roll(one, 1, 1))  # token t is followed by t + 1
    params["norm"] = Tensor(np.ones(D, np.float32))
    module = params["mtp"][0]
    module["enorm"] = module["norm"] = Tensor(np.ones(D, np.float32))
    module["eh_proj"] = Tensor(np.concatenate([one, 0 * one]))
    engine = Engine(params, cfg, max_batch=2, max_length=64, speculative=True)
    requests = [engine.submit(p, Sampling(max_new_tokens=20)) for p in ([3], [7, 8, 9])]
    events = drain(engine)
    assert [text(events[r]) for r in requests] == [[(3 + i) % D for i in range(1, 21)], [(9 + i) % D for i in range(1, 21)]]
    assert engine.stats.accepted == engine.stats.drafted == 20  # two tokens a step, after the first


def test_drafts_are_the_modules():
    """Every draft is what the MTP module says in its training form: the engine accepts as many as a count over whole texts."""
    cfg, new = CFG.replace(vocab_size=7), 24
    params, prompts = dsv3.init(cfg, seed=6), [[3, 5, 2, 6], [4], [1, 2, 3, 4, 5, 6, 5, 4, 3]]
    engine = Engine(params, cfg, max_batch=2, max_length=64, block_size=4, speculative=True)
    requests = [engine.submit(p, Sampling(max_new_tokens=new)) for p in prompts]
    events, expected = drain(engine), 0
    block = make_block(cfg, None, None)

    @dsv3.jit
    def module_logits(params, tokens):
        """Of the module at each position: what it says of the token after next."""
        module, embedded = params["mtp"][0], embed(params["embed"], tokens)
        x = layers(params["layers"], embedded, {"tokens": tokens}, block, False, cfg)[0]
        hidden = rms_norm(x, params["norm"], cfg.rms_norm_eps)[:, :-1]
        joined = mtp_input(module, embedded[:, 1:], hidden, cfg=cfg)
        x = block(module, joined, rope_tables(None, tokens.shape[1] - 1, cfg=cfg), None)[0]
        return head(params, rms_norm(x, module["norm"], cfg.rms_norm_eps))

    for prompt, request in zip(prompts, requests):
        whole = prompt + text(events[request])
        drafts = module_logits(params, np.array([whole])).asnumpy()[0].argmax(-1)
        at, end = len(prompt), len(whole)
        while at < end - 1:  # token ``at`` is the last that is known; the draft is of the next
            right = drafts[at - 1] == whole[at + 1]
            expected += right
            at += 2 if right else 1
    assert engine.stats.accepted == expected > 3


def test_drafted_draws_follow_the_probabilities(params):
    """The two tokens after a prompt, 800 times: as often as by plain decoding's exact probabilities (chi-squared)."""
    engine, prompt = Engine(params, CFG, max_batch=16, max_length=16, speculative=True), [5, 9]
    def logits_after(tokens):
        return dsv3.forward(params, np.array([tokens]), cfg=CFG).asnumpy()[0, -1].astype(np.float64) / 0.4
    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    first = softmax(logits_after(prompt))
    likely = int(first.argmax())
    second = softmax(logits_after([*prompt, likely]))
    requests = [engine.submit(prompt, Sampling(max_new_tokens=3, temperature=0.4, seed=i)) for i in range(800)]
    events = drain(engine)
    firsts = np.array([events[r][0].token for r in requests])
    seconds = np.array([events[r][1].token for r in requests])[firsts == likely]
    assert engine.stats.accepted > 5 and len(seconds) > 80
    for drawn, p in ((firsts, first), (seconds, second)):
        expected, found = len(drawn) * p, np.bincount(drawn, minlength=CFG.vocab_size)
        big = expected >= 5
        expected, found = [np.append(x[big], x[~big].sum()) for x in (expected, found)]
        chi = ((found - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        assert chi < len(expected) + 4 * np.sqrt(2 * len(expected)) + 8, (chi, len(expected))


# -- requests ----------------------------------------------------------------------------------------------------------
def test_how_a_request_ends(engine):
    prompt = prompts_of(5, 1)[0]
    request = engine.submit(prompt, Sampling(max_new_tokens=8, ignore_eos=True, logprobs=2))
    events = drain(engine)[request]
    assert [e.finish for e in events] == [None] * 7 + ["length"]
    assert all(e.top[0][0] == e.token and e.top[0][1] == e.logprob and len(e.top) == 2 for e in events)
    third = events[2].token
    until = text(events).index(third) + 1
    request = engine.submit(prompt, Sampling(max_new_tokens=8, ignore_eos=True, stop_token_ids=(third,)))
    stopped = drain(engine)[request]
    assert text(stopped) == text(events)[:until] and stopped[-1].finish == "stop" and stopped[0].logprob is None
    request = engine.submit([2] * 45, Sampling(max_new_tokens=100, ignore_eos=True))
    assert len(drain(engine)[request]) == 5  # max_length is 50


def test_log_probabilities_are_the_forwards(params, engine):
    prompt = [3, 1, 4, 15]
    request = engine.submit(prompt, Sampling(max_new_tokens=1, temperature=3.0, top_k=2, seed=0, logprobs=0))
    event = drain(engine)[request][0]
    logits = dsv3.forward(params, np.array([prompt]), cfg=CFG).asnumpy()[0, -1].astype(np.float64)
    assert event.logprob == pytest.approx(logits[event.token] - np.log(np.exp(logits).sum()), abs=1e-5)


def test_admission_is_in_order_and_by_blocks(engine):
    """60 places: a request of 48 has to wait for one of 40, and one of 8 behind it does not overtake."""
    first = engine.submit([2] * 30, Sampling(max_new_tokens=10, ignore_eos=True))
    second = engine.submit([3] * 40, Sampling(max_new_tokens=8, ignore_eos=True))
    third = engine.submit([4] * 4, Sampling(max_new_tokens=4, ignore_eos=True))
    order = []
    while not engine.idle:
        for event in engine.step():
            if event.request not in order:
                order.append(event.request)
        running, waiting = engine.stats.running, engine.stats.waiting
        assert (running, waiting) != (2, 1) or first not in order or len(order) > 1
    assert order == [first, second, third]
    assert engine.stats.free_blocks == engine.stats.blocks == 15


def test_cancelling_frees_at_once(engine):
    a = engine.submit([2] * 20, Sampling(max_new_tokens=20))
    b = engine.submit([3] * 30, Sampling(max_new_tokens=20))
    engine.step()
    taken = engine.stats.blocks - engine.stats.free_blocks
    assert taken == 10 and engine.stats.waiting == 1
    engine.cancel(a)
    assert engine.stats.free_blocks == engine.stats.blocks and engine.stats.running == 0
    engine.cancel(b)
    engine.cancel(b)
    engine.cancel(12345)
    assert engine.idle and engine.step() == []


def test_a_known_beginning_is_not_computed_again(params):
    engine = Engine(params, CFG, max_batch=2, max_length=50, cache_tokens=60, block_size=4, chunk=32)
    start = list(range(2, 26))
    def ask(prompt):
        before = engine.stats.reused_tokens
        request = engine.submit(prompt, Sampling(max_new_tokens=6, ignore_eos=True))
        found = text(drain(engine)[request])
        return found, engine.stats.reused_tokens - before
    alone, none = ask(start)
    again, most = ask(start)
    assert again == alone and none == 0 and most == (len(start) - 1) // 4 * 4
    talk, more = ask(start + alone[:5] + [40])
    assert more == (len(start) + 5) // 4 * 4  # what was generated is known too
    engine.renew(params)
    assert ask(start + alone[:5] + [40]) == (talk, 0)
    for i in range(4):  # others need the places
        ask([30 + i] * 40)
    assert ask(start) == (alone, 0)


def test_bounded_graphs(params):
    """Any mix of lengths and numbers compiles one graph a power of two, and nothing on the second day."""
    engine, before = Engine(params, CFG, max_batch=4, max_length=100, block_size=4, chunk=64), compile_count()
    def day(seed):
        for prompt in prompts_of(seed, 12, 90):
            engine.submit(prompt, Sampling(max_new_tokens=5))
            if seed % 2:
                engine.step()
        drain(engine)
    day(1)
    day(2)
    made = compile_count() - before
    assert made <= 2 + 3 + 3, made  # prompts of 32, 64; chunks of 16, 32, 64; batches of 1, 2, 4
    day(1)
    day(4)
    assert compile_count() - before <= 8


@pytest.mark.parametrize("prompt, sampling, words", [
    ([], {}, "the prompt is empty"), ([53], {}, "the id 53; expected 0 to 52"), ([-1], {}, "the id -1"),
    ([2] * 50, {}, "max_length is 50"), ([2] * 41, {"max_new_tokens": 30}, None)])
def test_refused_requests(engine, prompt, sampling, words):
    if words is None:  # 50 tokens fit into 60 places
        request = engine.submit(prompt, Sampling(**sampling))
        engine.cancel(request)
        return
    with pytest.raises(ValueError, match=words):
        engine.submit(prompt, Sampling(**sampling))


def test_room_for_all_by_default(params):
    """Sixteen of the greatest length run together, with the place that a draft needs beyond it."""
    engine = Engine(params, CFG, max_batch=16, max_length=32, block_size=16, speculative=True)
    requests = [engine.submit(p, Sampling(max_new_tokens=32 - len(p), ignore_eos=True)) for p in prompts_of(3, 16, 20)]
    engine.step()
    assert engine.stats.waiting == 0 and engine.stats.running == 16
    for request in requests:
        engine.cancel(request)
    assert engine.stats.free_blocks == engine.stats.blocks == 48


def test_refused_settings(params):
    with pytest.raises(ValueError, match="chunk=48; expected a power of two, at least 32"):
        Engine(params, CFG, chunk=48)
    with pytest.raises(ValueError, match="max_batch=0"):
        Engine(params, CFG, max_batch=0)
    with pytest.raises(ValueError, match="needs the params of an MTP module"):
        Engine({k: v for k, v in params.items() if k != "mtp"}, CFG, speculative=True)
    small = Engine(params, CFG, max_length=50, cache_tokens=20, block_size=4)
    with pytest.raises(ValueError, match="need 8 blocks of 4; the cache has 5"):
        small.submit([2] * 20, Sampling(max_new_tokens=10))


def test_text_in_text_out(params):
    tokenizer = dsv3.data.load_tokenizer("byte")
    cfg = CFG.replace(vocab_size=tokenizer.vocab_size)
    params = dsv3.init(cfg, seed=1)
    found = generate(params, ["ab", "c"], cfg=cfg, max_new_tokens=5, tokenizer=tokenizer)
    ids = generate(params, [[256, 97, 98], [256, 99]], cfg=cfg, max_new_tokens=5, eos_token_id=257)
    assert found == [tokenizer.decode(row[:-1] if row[-1] == 257 else row) for row in ids]


def test_params_that_were_trained_on():
    """generate sees what a step has changed in place, and what was assigned; it keeps no engine beyond the life of its params."""
    assert dsv3.generate is generate  # whoever has imported its module before
    cfg, optimizer = CFG, dsv3.adamw(learning_rate=0.1)
    params = dsv3.init(cfg, seed=9)
    step, state = dsv3.make_train_step(cfg, optimizer), optimizer.init(params)
    batch = {"tokens": np.array([[5, 6, 7, 8, 9, 10]] * 2)}

    def write(tree):
        return generate(tree, [[5, 6, 7]], cfg=cfg, max_new_tokens=8)

    before = write(params)
    params, state, _ = step(params, state, batch)
    trained = write(params)
    assert before != trained == write(dsv3.tree.tree_map(lambda leaf: leaf * 1, params))
    write(params)
    params["head"].assign_value(params["head"] * -1)
    assert trained != write(params)
    assert len(generation._engines) == 1
    del params, step, state
    gc.collect()
    assert not generation._engines


# -- blocks ------------------------------------------------------------------------------------------------------------
def test_blocks_are_lent_and_kept():
    blocks = Blocks(6, 2)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    names = digests(tokens, 2)
    assert len(names) == 3 and names == digests(tokens, 2, names[:1]) and names[1] != digests([9, 9, 3, 4], 2)[1]
    a = blocks.take(4)
    assert sorted(a) == [1, 2, 3, 4] and blocks.free == 1
    for block, name in zip(a, names):
        blocks.know(block, name)
    assert blocks.match(names) == a[:3]
    blocks.give_back(a)
    assert blocks.free == 2 and blocks.kept == 0
    blocks.give_back(a[:3])
    assert blocks.free == 5 and blocks.kept == 3
    assert len(blocks.take(3)) == 3  # two that know nothing, and of the kept the end of the sequence
    assert blocks.match(names) == a[:2]
    with pytest.raises(ValueError, match="1 blocks wanted, 0 free of 5"):
        blocks.take(1)


def test_a_thousand_days_of_blocks():
    """Random lending against a plain account: nothing is lent twice unless matched, nothing is lost."""
    rng, blocks, held = np.random.default_rng(0), Blocks(20, 2), []
    for _ in range(3000):
        if held and rng.random() < 0.45:
            blocks.give_back(held.pop(rng.integers(len(held))))
        else:
            tokens = [int(rng.integers(3)) for _ in range(2 * rng.integers(1, 5))]
            names = digests(tokens, 2)
            found = blocks.match(names)
            if len(names) - len(found) > blocks.free:
                blocks.give_back(found)
                continue
            own = found + blocks.take(len(names) - len(found))
            for block, name in zip(own, names):
                blocks.know(block, name)
            assert len(set(own)) == len(own)
            held.append(own)
        lent = {b for own in held for b in own}
        assert blocks.free == 19 - len(lent) and 0 not in lent
    for own in held:
        blocks.give_back(own)
    assert blocks.free == 19
