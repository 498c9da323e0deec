"""The embedded task's verifier as verl calls a reward."""

from isentropic.tasks.expressions import expr


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(expr.verify(solution_str, target=int(ground_truth), digit=1))
