"""LLM: the model in the caller's own process, without sockets; the same loop, and so the same tokens, as the server."""

from __future__ import annotations

import random
import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .checkpoint import demo
from .checkpoint.hub import resolve
from .client import ChoiceOutput, TokenLogprobs
from .client.steps import outputs_of_step
from .config import Config
from .engine.executor import InlineExecutor, StepResult
from .engine.inbox import add
from .engine.loop import EngineLoop
from .engine.outbox import step_columns
from .engine.process import make_core
from .problems import validate
from .runner.model_runner import ModelRunner
from .text.detokenizer import Detokenizer
from .text.loading import load_chat_template, load_tokenizer, locate_tokenizer
from .wire import AddRequest, FinishReason, SamplingParams

if TYPE_CHECKING:
    from ._core import Outputs, Scheduler

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
_FINISH_NAMES: dict[FinishReason, Literal["stop", "length"]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass
class CompletionOutput:
    """One reply to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token id if asked for


@dataclass
class RequestOutput:
    """A prompt and its ``n`` replies."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


class LLM:
    """A loaded model. Knows prompts and replies; not steps. One caller at a time.

    ``model``: a local folder, a GGUF file or a hub id; none: the demo model.
    ``options``: fields of ModelConfig, CacheConfig, SchedulerConfig and EngineConfig by name (``max_model_len=2048``).
    Raises TypeError for a name that none of them has, ValueError for a value out of range, and StartupError if the
    model cannot be loaded.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        config = _config({"model": model, **options})
        self.config = replace(config, model=demo.unless_named(config.model))
        resolved = resolve(self.config.model)
        given = self.config.model.tokenizer
        self.tokenizer = load_tokenizer(locate_tokenizer(given, self.config.model) if given else resolved.path)
        self.chat_template = load_chat_template(self.tokenizer, self.config.model.chat_template)
        runner = ModelRunner.load(self.config, resolved, lambda phase, share: None)
        self._executor = InlineExecutor(self.config, runner)
        self._facts = self._executor.allocate()
        self.core = self._new_core()
        seed = self.config.model.seed
        self._seeds: random.Random = random.Random(seed) if seed >= 0 else secrets.SystemRandom()
        self._next_id = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[RequestOutput]:
        """Replies to every prompt, in their order. A prompt is a text or its token ids; ``sampling_params``: for all,
        or one for each. Raises ValueError, with the numbers, for what can never run; then nothing has run."""
        many = _as_prompts(prompts)
        params = _for_each(sampling_params, len(many))
        run = _Run(self, n)
        try:
            for prompt, its_params in zip(many, params, strict=True):
                run.add(prompt, its_params)
        except ValueError:
            run.abort()
            raise
        self.run_loop(run)
        return run.results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Replies to a conversation, or to each of several. Raises ValueError if the model has no chat template."""
        if self.chat_template is None:
            raise ValueError("the model has no chat template: give one, LLM(..., chat_template=FILE)")
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [
            self.chat_template.render(conversation, add_generation_prompt=add_generation_prompt)
            for conversation in conversations
        ]
        # Templates write the special tokens themselves.
        outputs = self.generate([self.tokenizer.encode(text, False) for text in texts], sampling_params, n=n)
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

    def take_ids(self, count: int) -> int:
        self._next_id += count
        return self._next_id - count

    def with_seed(self, params: SamplingParams) -> SamplingParams:
        return params if params.seed is not None else msgspec.structs.replace(params, seed=self._seeds.getrandbits(63))

    def run_loop(self, run: _Run) -> None:
        try:
            EngineLoop(self.core, self._executor, run, run).run()
        except BaseException:
            # Ctrl-C, say: a step that was under way is never committed, and no other scheduler state follows from that.
            self.core = self._new_core()
            raise

    def _new_core(self) -> Scheduler:
        return make_core(self.config, self._executor, self._facts)


class _Run:
    """The requests of one call, from their prompts to their texts: the loop's source and sink."""

    def __init__(self, llm: LLM, n: int) -> None:
        self._llm, self._n = llm, n
        self.results: list[RequestOutput] = []
        self.stopping = False
        self._choices: dict[int, tuple[RequestOutput, CompletionOutput, Detokenizer]] = {}
        self._stopped: list[int] = []  # by a stop string; the scheduler has not heard of it

    def add(self, prompt: Prompt, params: SamplingParams) -> None:
        llm, n = self._llm, self._n
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else array("i", prompt)
        eos = () if params.ignore_eos else llm.tokenizer.special.eos_token_ids
        request = AddRequest(llm.take_ids(n), n, 0, llm.with_seed(params), eos)
        add(llm.core, 0, request, ids)
        text = prompt if isinstance(prompt, str) else None
        result = RequestOutput(text, ids.tolist(), [CompletionOutput(index) for index in range(n)])
        self.results.append(result)
        for output in result.outputs:
            detokenizer = Detokenizer(llm.tokenizer, params, eos)
            self._choices[request.id + output.index] = (result, output, detokenizer)

    def abort(self) -> None:
        self._llm.core.abort(array("Q", self._choices))
        self._choices.clear()

    # Source

    def drain(self, core: Scheduler, wait: bool) -> None:
        if self._stopped:
            core.abort(array("Q", self._stopped))
            self._stopped.clear()
        self.stopping = core.idle

    # Sink

    def send(self, outputs: Outputs, result: StepResult) -> None:
        if not outputs.num_rows:
            return
        header, columns = step_columns(outputs, result, 0, outputs.num_rows)
        for id, output in outputs_of_step(header, [bytes(column) for column in columns]):
            self._take(id, output)

    def send_stats(self, core: Scheduler, idle: bool) -> None:
        pass

    def _take(self, id: int, new: ChoiceOutput) -> None:
        if id not in self._choices:
            return  # stopped, and one step more was under way
        result, output, detokenizer = self._choices[id]
        before = detokenizer.num_tokens
        output.text += detokenizer.feed(new.token_ids, new.finish)
        taken = detokenizer.num_tokens - before
        output.token_ids += new.token_ids[:taken]
        output.logprobs += new.logprobs[:taken]
        if new.cached_tokens >= 0 and output.index == 0:
            result.num_cached_tokens = new.cached_tokens
        output.finish_reason = "stop" if detokenizer.stopped else _FINISH_NAMES.get(new.finish)
        output.stop_reason = detokenizer.stop_reason
        if output.finish_reason is not None:
            del self._choices[id]
            if new.finish is FinishReason.NONE:
                self._stopped.append(id)


def _config(options: Mapping[str, Any]) -> Config:
    config, left = Config(), dict(options)
    for group in ("model", "cache", "scheduler", "engine"):
        old = getattr(config, group)
        chosen = {one.name: left.pop(one.name) for one in fields(old) if one.name in left}
        config = replace(config, **{group: replace(old, **chosen)})
    if left:
        raise TypeError(f"no such option: {', '.join(sorted(left))}")
    # Through JSON: types are checked as those of a configuration file are.
    try:
        return validate(Config.from_json(config.to_json()))
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts")
    return list(params)
