"""verl's rollout on the CPU, for tests: a server in a Ray actor that samples with transformers, by verl's interface.

verl imports this file, and the platform beside it, in each of its processes: VERL_USE_EXTERNAL_MODULES names them.
"""

import asyncio
import os

import ray
import torch
import verl.workers.rollout.base as base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class Server:
    """Answers requests in batches, by the weights that were sent last."""

    def __init__(self, path, length):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.waiting, self.flush, self.step, self.length = [], None, 0, length
        torch.manual_seed(0)

    async def ready(self):
        return os.getpid()

    async def load(self, weights, step):
        own = self.model.state_dict()
        for name, value in weights.items():
            own[name].copy_(torch.from_numpy(value))
        self.step = self.step if step is None else step

    async def generate(self, prompt_ids, sampling_params, **kwargs):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), dict(sampling_params), answer))
        if self.flush is None:
            self.flush = asyncio.ensure_future(self._answer())
        return await answer

    async def _answer(self):
        await asyncio.sleep(0.05)
        asked, self.waiting, self.flush = self.waiting, [], None
        pad, settings = self.tokenizer.pad_token_id, asked[0][1]
        width = max(len(ids) for ids, _, _ in asked)
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _, _ in asked])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _, _ in asked])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            temperature=float(settings.get("temperature", 1.0)),
            max_new_tokens=self.length,
            pad_token_id=pad,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[:, width:]
        logp = torch.stack(out.scores, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        ended = (tokens == self.tokenizer.eos_token_id).long().cumsum(1)
        lengths = (ended - (tokens == self.tokenizer.eos_token_id).long() == 0).sum(1).tolist()
        for (_, _, answer), made, sampled, n in zip(asked, tokens.tolist(), logp.tolist(), lengths, strict=True):
            answer.set_result(
                TokenOutput(
                    token_ids=made[:n],
                    log_probs=sampled[:n],
                    stop_reason="completed",
                    extra_fields={"global_steps": self.step},
                )
            )

    async def abort_all_requests(self, **kwargs):
        return {"aborted_count": 0, "request_ids": []}

    async def nothing(self, **kwargs):
        return None

    wake_up = sleep = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    async def launch_servers(self):
        options = {"name": f"cpu_rollout_{self.replica_rank}", "max_concurrency": 1000, "num_cpus": 0}
        server = ray.remote(Server).options(**options).remote(self.model_config.path, self.config.response_length)
        await server.ready.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = f"127.0.0.1:{18000 + self.replica_rank}"


class ServerAdapter(base.BaseRollout):
    """The worker's end: sends the weights over."""

    async def resume(self, tags):
        return None

    async def release(self):
        return None

    async def update_weights(self, weights, global_steps=None, **kwargs):
        sent = {name: x.detach().float().cpu().numpy().copy() for name, x in weights}
        await ray.get_actor(f"cpu_rollout_{os.environ['RANK']}").load.remote(sent, global_steps)


def load():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    wait = ReplayBuffer._wait_for_next_poll

    def soon(self, *args):
        self.poll_interval = 0.05  # verl looks every two seconds, and a test's step takes less than one
        return wait(self, *args)

    if wait.__name__ != "soon":
        ReplayBuffer._wait_for_next_poll = soon
    return Replica


base._ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.ServerAdapter"
RolloutReplicaRegistry.register("cpu", load)
