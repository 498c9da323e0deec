"""The model card of a run: what was trained, by which recipe to which entropy, with what result, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..recipes import Recipe
from ..recipes.knobs import all_knobs
from ..runs.record import versions
from ..runs.summary import closing_table

# As in CITATION.cff.
TITLE = "isentropic: entropy control for reinforcement learning of language models"
AUTHORS = "The isentropic authors"
LICENCE = "Apache-2.0"
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TRL = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and others},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


class Trained(NamedTuple):
    """What a card says of a model.

    Attributes:
        name: of the model.
        base: what it was trained from: a hub id, a directory, or another name.
        place: a hub id or a directory that the weights can be loaded from.
        task: what it was trained on.
        recipe_name, recipe: the algorithm.
        figures: of the run, as in summary.json; empty before its first step.
        temperature: of sampling in training, at which entropy was read.
        chat: whether prompts are conversations.
        tags: of the model on the hub.
        dataset: hub id of the data set, if it is known.
    """

    name: str
    base: str
    place: str
    task: str
    recipe_name: str
    recipe: Recipe
    figures: Mapping[str, Any]
    temperature: float = 1.0
    chat: bool = False
    tags: Sequence[str] = ()
    dataset: str | None = None


def on_hub(name: str) -> bool:
    """Whether a model's name is a hub id, and no directory here.

    Example:
        >>> on_hub("Qwen/Qwen3-0.6B"), on_hub("expr"), on_hub("/models/mine")
        (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).is_dir()


def papers(source: str) -> list[str]:
    """The papers that a recipe's source names, as links.

    Example:
        >>> papers("arXiv:2603.11682 [paper]; arXiv:2503.14476")
        ['[arXiv:2603.11682](https://arxiv.org/abs/2603.11682)', '[arXiv:2503.14476](https://arxiv.org/abs/2503.14476)']
    """
    return [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in dict.fromkeys(_ARXIV.findall(source))]


def citation() -> str:
    """How to cite isentropic, as BibTeX."""
    return "\n".join(
        (
            "@software{isentropic,",
            f"  title   = {{{{{TITLE}}}}},",
            f"  author  = {{{{{AUTHORS}}}}},",
            f"  version = {{{__version__}}},",
            f"  license = {{{LICENCE}}}",
            "}",
        )
    )


def snippet(model: Trained) -> str:
    """Python that loads the model and prints an answer, sampled as in training."""
    prompt = '[{"role": "user", "content": "What is 7 * 8?"}]' if model.chat else '"7*8="'
    return "\n".join(
        (
            "from transformers import pipeline",
            "",
            f'generate = pipeline("text-generation", model={json.dumps(model.place)})',
            f"prompt = {prompt}",
            "answer = generate(",
            "    prompt, max_new_tokens=128, do_sample=True, "
            f"temperature={model.temperature:g}, return_full_text=False",
            ")",
            'print(answer[0]["generated_text"])',
        )
    )


def model_card(model: Trained) -> str:
    """The card as the text of a README.md, with the fields that the hub reads."""
    base = f"[{model.base}](https://huggingface.co/{model.base})" if on_hub(model.base) else f"`{_short(model.base)}`"
    recipe = model.recipe
    target = str(getattr(recipe.target, "written", recipe.target))
    controller = str(getattr(recipe.controller, "written", recipe.controller))
    held = f"`{recipe.knob}`, turned by `{controller}`" if recipe.knob else "none: entropy was only monitored"
    knobs = all_knobs()
    sources = [
        recipe.source,
        *([knobs[recipe.knob].source] if recipe.knob in knobs else ["yours"] if recipe.knob else []),
    ]
    rows = [("base model", base), ("task", model.task)]
    rows += [
        ("recipe", recipe.formula if recipe.formula == model.recipe_name else f"{model.recipe_name}: {recipe.formula}"),
        ("its source", recipe.source),
        ("knob", held),
    ]
    if recipe.knob:
        rows += [("its source", sources[-1]), ("target of entropy", f"`{target}`")]
    rows += [("sampling temperature", f"{model.temperature:g}")]
    cited = papers("; ".join(sources))
    parts = [
        _front_matter(model),
        f"# {model.name}",
        f"Trained from {base} by reinforcement learning with [TRL](https://github.com/huggingface/trl) and isentropic, "
        f"which {'holds' if recipe.knob else 'reads'} the entropy of the policy. Entropy is in nats per generated "
        "token, at the sampling temperature.",
        f"## Use\n\n```python\n{snippet(model)}\n```",
        "## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows),
    ]
    if model.figures.get("steps"):
        parts.append(f"```text\n{closing_table(dict(model.figures)).strip()}\n```")
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts.append(f"Versions: {used}.")
    if cited:
        parts.append(f"## Papers\n\n{', '.join(cited)}")
    parts.append(f"## Citation\n\n```bibtex\n{citation()}\n\n{_TRL}\n```")
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Trained) -> str:
    from huggingface_hub import ModelCardData

    fields = ModelCardData(
        base_model=model.base if on_hub(model.base) else None,
        datasets=model.dataset,
        library_name="transformers",
        model_name=model.name,
        tags=sorted({"generated_from_trainer", *model.tags}),
    )
    return f"---\n{fields.to_yaml().strip()}\n---"


def _short(name: str) -> str:
    """A directory by its last name alone: where it is on a machine is nobody else's business."""
    return Path(name).name or name


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
