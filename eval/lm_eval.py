"""Tasks of EleutherAI's lm-eval (pip install lm-eval): python -m eval.lm_eval --run=runs/NAME --tasks=lambada_openai

Prompts and metrics are lm-eval's, likelihoods and texts ours; results go to RUN/eval-STEP/lm_eval.json too."""

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

from data import files
from eval import harness, taskloss
from optimoe import config, load

try:
    import lm_eval
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError:  # `main` says what to install
    lm_eval = None
GENERATION = dict(until=(), max_gen_toks=256, do_sample=True, temperature=0.0, top_p=1.0, seed=0, batch_size=64)


@dataclass(frozen=True)
class LMEvalConfig(load.ModelChoice):
    # lm-eval
    tasks: tuple[str, ...] = ()  # names of lm-eval's tasks or groups
    include_path: str | None = None  # a folder with task files of your own
    shots: int | None = None  # examples in front of each question; none: as many as the task says
    limit: int | None = None  # only the first so many items of each task; none: all
    out: str = ""  # directory of the results; empty: RUN/eval-STEP, with --hf: HF/eval


class Model(lm_eval.api.model.LM if lm_eval else object):
    def costs(self, pairs):
        found = taskloss.token_costs(self.loaded.model, list(pairs), n_vocab=self.loaded.tokens.n_vocab)
        return [(-float(nats.sum()), bool(best.all())) for nats, best in found]

    def loglikelihood(self, requests):
        # Spaces at the end of a context belong to the continuation, as in lm-eval's own models.
        split = [(len(context.rstrip()), context + answer) for context, answer in (r.args for r in requests)]
        return self.costs(taskloss.encode_pair(self.loaded.tokens, text[:n], text[n:])[:2] for n, text in split)

    def loglikelihood_rolling(self, requests):
        tokens, length = self.loaded.tokens, self.loaded.model.cfg.seq_len
        texts, start = [tokens.encode(r.args[0]) for r in requests], (tokens.bos or tokens.eos)[0]
        windows = (get_rolling_token_windows(ids, start, length, 1) for ids in texts)
        return [sum(cost for cost, _ in self.costs(map(make_disjoint_window, parts))) for parts in windows]

    def generate_until(self, requests):
        found, kinds = {}, [json.dumps(r.args[1], sort_keys=True) for r in requests]
        for kind in set(kinds):
            how = SimpleNamespace(**GENERATION | json.loads(kind))
            how.temperature *= how.do_sample
            how.stops = tuple(filter(None, [how.until] if isinstance(how.until, str) else how.until))
            own = [i for i, other in enumerate(kinds) if other == kind]
            prompts, room = [requests[i].args[0] for i in own], self.loaded.model.cfg.seq_len // 2
            texts, _ = harness.texts(self.loaded, how, prompts, own, min(room, how.max_gen_toks), how)
            found |= zip(own, texts, strict=True)
        return [found[i] for i in range(len(requests))]


def main(argv=None):
    cfg = config.parse(LMEvalConfig, sys.argv[1:] if argv is None else argv, __doc__)
    config.require(lm_eval, "tasks", cfg.tasks, "these are tasks of lm-eval: pip install lm-eval")
    model, manager = Model(), lm_eval.tasks.TaskManager(include_path=cfg.include_path)
    model.loaded, out = harness.open_model(cfg)
    asked = dict(tasks=list(cfg.tasks), task_manager=manager, num_fewshot=cfg.shots, limit=cfg.limit)
    found = lm_eval.simple_evaluate(model, **asked)
    files.write_json(out / "lm_eval.json", json.loads(json.dumps(found["results"], default=str)))
    print(f"{make_table(found)}\n{out}/lm_eval.json")
    return found


if __name__ == "__main__":
    config.command_line(main)
