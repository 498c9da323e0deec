"""``{catalogue} WHAT``: the recipes, knobs, shapings, controllers, targets and settings as tables, from the code."""

from dataclasses import fields

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from isentropic.control.controllers import CONTROLLERS
from isentropic.control.targets import TARGETS
from isentropic.experiments.config import RunConfig
from isentropic.recipes import RECIPES, Recipe, compose, knob_range
from isentropic.recipes.knobs import all_knobs, readers
from isentropic.recipes.stages import STAGES


def _table(heads, rows):
    """A Markdown table; a bar inside a cell is escaped."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(recipe):
    """The numbers of a recipe that are in force."""
    found = []
    if recipe.clips:
        low = "" if recipe.objective == "cispo" else f"{recipe.clip_low:g}, "
        found.append(f"clip {low}{recipe.clip_high:g}" + ("" if recipe.bounds == "additive" else f", {recipe.bounds}"))
    if recipe.entropy_coef:
        found.append(f"entropy_coef {recipe.entropy_coef:g}")
    if recipe.penalty != "none":
        found.append(f"penalty `{recipe.penalty}` × {recipe.penalty_coef:g}")
    return "; ".join(found) or "–"


def _control(recipe):
    if recipe.knob is None:
        return "–"
    when = "a generated batch" if recipe.every is None else f"every {recipe.every}"
    return f"`{recipe.knob}` by `{recipe.controller}`, target `{recipe.target}`, {when}"


def recipes():
    """Formula and source of each recipe."""
    return _table(["recipe", "formula", "source"], [[f"`{n}`", r.formula, r.source] for n, r in RECIPES.items()])


def components():
    """What each recipe is made of."""
    rows = [
        [
            f"`{name}`",
            f"`{r.baseline}`",
            f"`{r.selection}`",
            f"`{r.shaping}`",
            f"`{r.objective}`" + (", on-policy" if r.on_policy else ""),
            f"`{r.reduction}`",
            _numbers(r),
            _control(r),
        ]
        for name, r in RECIPES.items()
    ]
    return _table(["recipe", "baseline", "selection", "shaping", "objective", "reduction", "numbers", "control"], rows)


def knobs():
    """The range of each knob on the recipe it suits, and where it is from."""
    rows = []
    for name, knob in all_knobs().items():
        changes = {"penalty": "aent", "penalty_coef": RECIPES["aent"].penalty_coef} if knob.needs == "penalty" else {}
        span = knob_range(compose("dapo", knob=name, **changes))
        way = "raises" if span.sign > 0 else "lowers"
        shapings = readers(name)
        needs = f"shaping `{shapings[0]}`" if shapings else f"a {knob.needs}" if knob.needs else "nothing"
        rows.append([f"`{name}`", f"{span.start:g} in [{span.low:g}, {span.high:g}]", way, needs, knob.source])
    return _table(["knob", "start and range on `dapo`", "a larger value", "needs", "source"], rows)


def _stage(stage, what):
    """The table of a stage: names with their formulas, and their constants with defaults."""
    rows = [[f"`{name}`", _formula(stage, c.formula), _defaults(c.constants)] for name, c in STAGES[stage].items()]
    return _table([stage, what, "constants"], rows)


def _formula(stage, text):
    return f"`{text}`" if stage in ("baseline", "shaping", "objective") else text


def _defaults(numbers):
    return ", ".join(f"`{name}={x:g}`" for name, x in numbers.items()) or "–"


def baselines():
    return _stage("baseline", "advantage")


def selections():
    return _stage("selection", "advantages that count")


def shapings():
    return _stage("shaping", "advantage")


def objectives():
    return _stage("objective", "loss of a token")


def bounds():
    return _stage("bounds", "what holds the ratio")


def penalties():
    return _stage("penalty", "added to the loss, times `penalty_coef`")


def controllers():
    """The first line of each docstring, and the options with their defaults."""
    from inspect import signature

    rows = []
    for name, make in CONTROLLERS.items():
        options = list(signature(make).parameters.values())[1:]
        shown = ", ".join(f"`{o.name}={'' if o.default is None else o.default}`" for o in options)
        first = (make.__doc__ or "").splitlines()[0].replace("``", "`")
        rows.append([f"`{name}`", first, shown or "–"])
    return _table(["controller", "what it does", "options"], rows)


def targets():
    return _table(["target", "meaning"], [[f"`{form}`", meaning] for form, meaning in TARGETS.items()])


def settings():
    """Every setting of `isentropic train`, by group."""
    rows = []
    for setting in fields(RunConfig):
        plain = setting.default is not None and isinstance(setting.default, str | int | float)
        meaning = setting.metadata["help"]
        if choices := setting.metadata.get("choices"):
            meaning = f"{meaning}: {', '.join(choices)}"
        rows.append([setting.metadata["group"], f"`{setting.name}`", meaning, f"`{setting.default}`" if plain else "–"])
    return _table(["group", "key", "meaning", "default"], rows)


def recipe_fields():
    """Every field of a recipe, with its default."""
    fresh = Recipe("", "")
    names = [f.name for f in fields(Recipe) if f.name not in ("formula", "source")]
    rows = [[f"`{name}`", f"`{getattr(fresh, name)}`"] for name in names]
    return _table(["field", "default"], rows)


TABLES = {
    build.__name__: build
    for build in (
        recipes,
        components,
        knobs,
        baselines,
        selections,
        shapings,
        objectives,
        bounds,
        penalties,
        controllers,
        targets,
        settings,
        recipe_fields,
    )
}


class Catalogue(SphinxDirective):
    """One of ``TABLES``, in the place of the directive."""

    required_arguments = 1

    def run(self):
        box = nodes.container(classes=["catalogue"])
        box += self.parse_text_to_nodes(TABLES[self.arguments[0]]())
        return [box]


def setup(app):
    app.add_directive("catalogue", Catalogue)
    return {"version": "1", "parallel_read_safe": True}
