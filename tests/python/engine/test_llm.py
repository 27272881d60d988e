"""The offline LLM on a tiny model: real runner and kernels; and the same tokens over HTTP."""

from __future__ import annotations

import gc
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_serve import LLM, SamplingParams
from hybrid_serve.errors import StartupError
from in_process import Generator
from server_process import ServerProcess
from tiny_models import make_tiny_model

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks_override": 64, "max_num_seqs": 8, "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    llm = LLM(str(model), **OPTIONS)
    yield llm
    assert llm.core.idle
    llm.core.check_invariants()


def greedy(max_tokens: int = 12, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **others)


def test_a_batch_gives_what_scheduler_and_runner_alone_give_and_each_prompt_alone(llm: LLM) -> None:
    prompts = ["the bat", "a", "to be or not to be, that is", "the bat sat on the mat and was fat"]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy())]
    alone = [llm.generate(prompt, greedy())[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone
    ids = [list(llm.tokenizer.encode(prompt)) for prompt in prompts]
    reference = Generator(llm._executor._runner, num_blocks=64)
    expected = reference.generate(ids, max_tokens=12)
    llm.core = llm._new_core()  # the runner was bound to the reference's arenas
    assert together == expected


def test_a_swap_space_is_used_and_changes_no_token(llm: LLM, model: Path) -> None:  # S47
    prompts = ["the bat sat on the mat and was fat", "to be or not to be, that is", "a bat", "fat is the cat"]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy(60))]
    swapping = LLM(str(model), **OPTIONS | {"num_gpu_blocks_override": 17, "swap_space": 0.001})
    assert [output.outputs[0].token_ids for output in swapping.generate(prompts, greedy(60))] == expected
    stats = swapping.core.stats()
    assert stats.host_blocks_total == int(0.001 * 2**30) // swapping._executor._runner.facts.block_bytes
    assert stats.blocks_swapped_in > 0


def test_text_ids_and_reasons_belong_together(llm: LLM) -> None:
    (output,) = llm.generate([llm.tokenizer.encode("the bat").tolist()], greedy(8))
    assert output.prompt is None
    assert output.prompt_token_ids == llm.tokenizer.encode("the bat").tolist()
    (reply,) = output.outputs
    assert reply.text == llm.tokenizer.decode(reply.token_ids)
    assert (reply.finish_reason, reply.stop_reason, len(reply.token_ids)) == ("length", None, 8)


def test_a_stop_string_ends_the_text_before_it_and_frees_the_request(llm: LLM) -> None:
    whole = llm.generate("the bat", greedy(30))[0].outputs[0].text
    stop = whole[len(whole) // 2 :][:2]
    assert stop
    reply = llm.generate("the bat", greedy(30, stop=(stop,)))[0].outputs[0]
    assert reply.text == whole[: whole.index(stop)]
    assert (reply.finish_reason, reply.stop_reason) == ("stop", stop)
    assert llm.core.stats().blocks_used == 0


def test_choices_differ_and_seeds_repeat_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=2.0, seed=3, logprobs=2)
    first, second = (llm.generate("the bat", params, n=3)[0] for _ in range(2))
    texts = [reply.token_ids for reply in first.outputs]
    assert texts == [reply.token_ids for reply in second.outputs]
    assert len({tuple(text) for text in texts}) == 3
    assert second.num_cached_tokens == 0  # shorter than a block
    for reply in first.outputs:
        assert [len(entry.top) for entry in reply.logprobs] == [2] * len(reply.token_ids)


def test_many_prompts_with_a_sampler_each_outnumber_the_running_ones(llm: LLM) -> None:
    params = [greedy(1 + i % 7) for i in range(40)]
    outputs = llm.generate(["the bat"] * 40, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + i % 7 for i in range(40)]


def test_a_conversation_is_rendered_by_the_models_template(llm: LLM) -> None:
    message = {"role": "user", "content": "hello"}
    (output,) = llm.chat([message], greedy(4))
    assert output.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, False).tolist()
    both = llm.chat([[message], [message]], greedy(4))
    assert [one.outputs[0].token_ids for one in both] == [output.outputs[0].token_ids] * 2


def test_one_bad_prompt_runs_none_and_the_model_stays_usable(llm: LLM) -> None:
    before = llm.core.stats().steps
    with pytest.raises(ValueError, match="512"):
        llm.generate([[1, 2], [1] * 600], greedy())
    with pytest.raises(ValueError, match="empty"):
        llm.generate([[]], greedy())
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["fine"], [greedy(), greedy()])
    assert llm.core.stats().steps == before
    assert llm.generate([], greedy()) == []
    assert len(llm.generate("fine", greedy(3))[0].outputs[0].token_ids) == 3


def test_an_interruption_in_a_step_leaves_a_model_that_works(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("the bat", greedy())[0].outputs[0].token_ids
    runner = llm._executor._runner
    with monkeypatch.context() as patch:

        def interrupted(batch: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(runner, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the bat", "a"], greedy())
    assert llm.generate("the bat", greedy())[0].outputs[0].token_ids == expected


def test_options_are_those_of_the_configuration(model: Path) -> None:
    with pytest.raises(TypeError, match="no such option: colour"):
        LLM(str(model), colour="red")
    with pytest.raises(ValueError, match="block_size is 17"):
        LLM(str(model), block_size=17)
    with pytest.raises(ValueError, match="dtype"):
        LLM(str(model), dtype="float64")
    with pytest.raises(StartupError, match="HS-E021"):
        LLM(str(model / "missing"))


def test_the_server_gives_the_same_tokens(llm: LLM, model: Path, tmp_path: Path) -> None:
    """B48."""
    prompts = ["the bat", "to be or not to be", "a"]
    with ServerProcess(
        tmp_path,
        str(model),
        load="hybrid_serve.engine.executor:load_inline",
        api_entry="hybrid_serve.server.process:main",
        model_options={"dtype": "float32"},
    ) as server:
        server.wait_ready(60)
        host, port = server.address
        body = {"model": str(model), "prompt": prompts, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 2}
        request = urllib.request.Request(
            f"http://{host}:{port}/v1/completions",
            json.dumps(body | {"return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            choices = json.load(response)["choices"]
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=7)
    replies = [reply for output in llm.generate(prompts, params, n=2) for reply in output.outputs]
    assert [choice["token_ids"] for choice in choices] == [reply.token_ids for reply in replies]
    assert [choice["text"] for choice in choices] == [reply.text for reply in replies]
    assert [choice["finish_reason"] for choice in choices] == [reply.finish_reason for reply in replies]


def test_one_that_goes_leaves_no_memory_of_batches_open(model: Path) -> None:
    def arenas() -> set[int]:
        open_files = ((fd, os.path.realpath(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd"))
        return {os.stat(int(fd)).st_ino for fd, path in open_files if path.startswith("/memfd:hybrid-serve-arena")}

    others = arenas()  # of tests before this one
    more = [LLM(str(model), **OPTIONS)]
    its = arenas() - others
    assert its
    more.clear()
    gc.collect()
    assert not its & arenas()
