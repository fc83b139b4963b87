"""Tasks of EleutherAI's lm-eval: python -m eval.lm_eval --run=runs/NAME --tasks=lambada_openai

Prompts and metrics are lm-eval's; likelihoods and texts are ours. Results also go to RUN/eval-STEP/lm_eval.json."""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

from data import files
from eval import harness, taskloss
from optimoe import config, load

try:
    from lm_eval import simple_evaluate, tasks, utils
    from lm_eval.api.model import TemplateLM
except ImportError:  # `main` says what to install
    TemplateLM = object
GENERATION = dict(until=(), max_gen_toks=256, do_sample=True, temperature=0.0, top_p=1.0, seed=0, batch_size=64)


@dataclass(frozen=True)
class LMEvalConfig(load.ModelChoice):
    tasks: tuple[str, ...] = ()  # lm-eval's tasks and groups, or files of your own in its form (.yaml)
    shots: int | None = None  # examples in front of each question; none: as the task says
    limit: int = 0  # only this many items of each task, the first ones; 0: all
    out: str = ""  # directory of the results; empty: RUN/eval-STEP, with --hf: HF/eval


class Model(TemplateLM):
    eot_token_id = prefix_token_id = property(lambda self: (self.loaded.tokens.bos or self.loaded.tokens.eos)[0])

    def tok_encode(self, text, add_special_tokens=True, **_):
        ids = self.loaded.tokens.encode(text)
        return self.loaded.tokens.bos + ids if add_special_tokens else ids

    def _loglikelihood_tokens(self, requests, **_):
        found = taskloss.token_costs(self.loaded.model, [pair for _, *pair in requests])
        return [(-float(nats.sum()), bool(best.all())) for nats, best in found]

    def loglikelihood_rolling(self, requests, **_):
        found, length = [], self.loaded.model.cfg.seq_len
        for ids in (self.tok_encode(r.args[0], False) for r in requests):
            parts = utils.get_rolling_token_windows(ids, self.prefix_token_id, length, 1)
            pairs = [("", *utils.make_disjoint_window(part)) for part in parts]
            found.append(sum(cost for cost, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests, **_):
        harness.check_writes(self.loaded.model)
        found, kinds = {}, [json.dumps(r.args[1], sort_keys=True) for r in requests]
        for kind in set(kinds):
            how = SimpleNamespace(**GENERATION | json.loads(kind))
            how.temperature = how.temperature if how.do_sample else 0
            how.stops = tuple(filter(None, [how.until] if isinstance(how.until, str) else how.until))
            own = [i for i, other in enumerate(kinds) if other == kind]
            prompts, room = [requests[i].args[0] for i in own], self.loaded.model.cfg.seq_len // 2
            texts, _ = harness.texts(self.loaded, how, prompts, own, min(room, how.max_gen_toks), how)
            found |= zip(own, texts, strict=True)
        return [found[i] for i in range(len(requests))]


def main(argv=None):
    cfg = config.parse(LMEvalConfig, argv, __doc__)
    config.require(TemplateLM is not object, "tasks", cfg.tasks, "these are lm-eval's: pip install -e '.[lm_eval]'")
    model, manager, names = Model(), tasks.TaskManager(), list(cfg.tasks)
    known = names and all(name in manager.all_tasks or os.path.isfile(name) for name in names)
    config.require(known, "tasks", names, "unknown to lm-eval; `lm-eval ls tasks` lists what it has")
    model.loaded, out = harness.open_model(cfg)
    found = simple_evaluate(model, tasks=names, task_manager=manager, num_fewshot=cfg.shots, limit=cfg.limit or None)
    files.write_json(out / "lm_eval.json", json.loads(json.dumps(found["results"], default=str)))
    print(f"{utils.make_table(found)}\n{out}/lm_eval.json")
    return found


if __name__ == "__main__":
    config.command_line(main)
