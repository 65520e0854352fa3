"""Adapter that lets the LM evaluation harness score and run lordjax models.

It needs ``pip install lordjax[eval]``. The package registers `LordjaxLM` in the entry-point group
``lm_eval.models``. Releases of lm-eval after 0.4.13 read that group::

    lm_eval --model lordjax --model_args pretrained=DIR --tasks arc_easy,piqa --batch_size 16

Releases up to 0.4.13 do not read it. For them this module runs the same command with `LordjaxLM`
registered::

    python -m lordjax.scripts.harness --model lordjax --model_args pretrained=DIR --tasks …

`lordjax.evaluate.likelihood` scores the continuations, as in ``lordjax evaluate-choices``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - registers lm-eval's models; skipped once any is registered
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import MODEL_REGISTRY, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lordjax.evaluate import multiple_choice
from lordjax.evaluate.likelihood import BATCH, Score, log_likelihoods
from lordjax.generation.completion import encode
from lordjax.generation.sampling import Sampling
from lordjax.runtime import json_files
from lordjax.runtime.chat_template import render
from lordjax.scripts.console import progress_report
from lordjax.scripts.opened_model import open_model

MAX_NEW_TOKENS = 256  # limit when a task sets none; the harness's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # synonyms


class LordjaxLM(TemplateLM):
    """Dense or compressed model behind the harness's interface.

    Args:
      pretrained: the model: a Hugging Face directory or hub id, a GGUF file, or a directory that
        ``lordjax compress`` or ``lordjax convert`` wrote.
      batch_size: sequences per forward pass; "auto" means 16.
      max_length: maximum number of tokens in a sequence; None takes the model's maximum.
      max_gen_toks: maximum number of generated tokens, for tasks that set none.
      seed: seed of sampling.
      device: ignored. The harness always passes a torch device; JAX chooses by JAX_PLATFORMS.
      max_batch_size: ignored. The harness's search for a batch size is not implemented.

    Raises:
      FileNotFoundError: if ``pretrained`` does not exist.
      ValueError: if the model is not a causal language model, or ``batch_size`` is invalid.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = BATCH,
        max_length: int | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        del device, max_batch_size
        auto = str(batch_size).startswith("auto")
        if not auto and not str(batch_size).isdigit():
            raise ValueError(f"batch_size {batch_size!r}; expected a number, or auto")
        opened = open_model(pretrained)
        if opened.config.head != "causal" or not opened.config.causal:
            raise ValueError(
                f"{pretrained}: a model with head {opened.config.head!r} predicts no next token; "
                "give a causal language model"
            )
        self.config, self.tokenizer = opened.config, opened.tokenizer()
        self.params = opened.arrays()
        self.batch_size = BATCH if auto else int(batch_size)
        self.max_length = max_length or opened.config.max_positions
        self.max_gen_toks, self._seed, self._name = max_gen_toks, seed, pretrained
        self._stop_tokens = functools.partial(opened.stop_tokens, self.tokenizer)
        self._chat = False  # whether prompts are written by the chat template

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that is put before a text without context."""
        return multiple_choice.prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which the harness uses as key of its prompt cache."""
        return self._name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Formats a conversation as one prompt, with the tokenizer's chat template.

        Args:
          chat_history: messages with the keys "role" and "content".
          add_generation_prompt: True to end with the start of an assistant message; False to leave
            the last message open, so that the model continues it.
        """
        self._chat = True
        return render(
            self.tokenizer,
            chat_history,
            self._name,
            "the chat template cannot be used for these messages",
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenizes a text.

        Args:
          string: text to tokenize.
          add_special_tokens: whether special tokens are added; None takes the tokenizer's default.
          **kwargs: ignored; the harness may pass more.
        """
        del kwargs
        return encode(self.tokenizer, string, special=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._scores(pairs, disable_tqdm)
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _scores(self, pairs: Sequence[Any], quiet: bool) -> list[Score]:
        how = {"batch_size": self.batch_size, "max_length": self.max_length}
        with contextlib.nullcontext() if quiet else progress_report() as progress:
            return log_likelihoods(self.config, self.params, pairs, **how, progress=progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, split into windows of at most ``max_length`` tokens."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, score in zip(owners, self._scores(pairs, disable_tqdm), strict=True):
            sums[i] += score.log_likelihood
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generates an answer per request, up to a stop string.

        Requests with the same settings run in the same batches.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json_files.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        for numbers in groups.values():
            prompts = [requests[i].args[0] for i in numbers]
            found = self._completed(prompts, requests[numbers[0]].args[1], disable_tqdm)
            for i, text in zip(numbers, found, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _completed(self, prompts: list[str], settings: dict[str, Any], quiet: bool) -> list[str]:
        from lordjax.generation import completion

        sampling, stops, new = generation(settings, self.max_gen_toks)
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"answers of {new} tokens, but the model's longest sequence is {self.max_length}, "
                "prompt included; lower max_gen_toks"
            )
        ids = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        with contextlib.nullcontext() if quiet else progress_report() as progress:
            found = completion.complete(
                self.params,
                self.config,
                self.tokenizer,
                ids,
                max_new_tokens=new,
                sampling=sampling,
                stop_strings=stops,
                stop_tokens=self._stop_tokens(chat=self._chat),
                seed=self._seed,
                batch_size=self.batch_size,
                progress=progress,
            )
        return [answer.text for answer in found]


# lm-eval after 0.4.13 has registered the name through the entry point.
if "lordjax" not in MODEL_REGISTRY:
    register_model("lordjax")(LordjaxLM)


def generation(settings: dict[str, Any], max_new_tokens: int) -> tuple[Sampling, list[str], int]:
    """Translates a task's generation settings.

    Args:
      settings: the task's ``generation_kwargs``.
      max_new_tokens: maximum number of new tokens, if the settings have none.

    Returns:
      The sampling settings, the stop strings, and the maximum number of new tokens.

    Raises:
      ValueError: if a setting is unknown. Ignoring it would change the answers.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    lengths = [left.pop(name, None) for name in LENGTHS]
    new = next((int(length) for length in lengths if length is not None), max_new_tokens)
    drawn, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    temperature = float(temperature if temperature is not None else 1.0 if drawn else 0.0)
    top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
    if left:
        raise ValueError(
            f"generation settings {', '.join(sorted(left))} are not known; expected only until, "
            f"do_sample, temperature, top_k, top_p, {', '.join(LENGTHS)}"
        )
    # do_sample=False means greedy decoding, whatever the temperature.
    sampling = Sampling() if drawn is False else Sampling(temperature, top_k or None, top_p)
    return sampling, stops, new


def main() -> None:
    """Runs the harness's command line with `LordjaxLM` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
