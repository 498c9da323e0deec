"""What the tests of this folder compare with: entropies from a model's plain logits."""

import torch


def plain_entropy(model, inputs):
    """Entropies at a completion's positions, ``[b t]``."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    position = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, position_ids=position).logits
    rows = logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].double().log_softmax(-1)
    return -(rows.exp() * rows).sum(-1)


def mean(values, mask):
    return ((values * mask).sum() / mask.sum()).item()


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}
