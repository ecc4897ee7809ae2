"""One process of a cluster of CPUs, started by msrun: greedy text of a cut model, to rank_<n>.json.

    msrun ... decode_worker.py MESH CHANGES(JSON) PROMPTS(JSON) NEW FOLDER
"""
import json
import sys
from pathlib import Path

from cluster import finish, start

import dsv3
from dsv3.engine import Engine
from dsv3.parallel.groups import own_rank
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.rules import make_rules
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import own
from dsv3.sampling import Sampling


def texts(mesh, changes, prompts, new, rank=None, speculative=True):
    """[ids of each prompt's continuation]: the first greedy, the second drawn, and so on in turns."""
    cfg = dsv3.TINY.replace(**changes)
    whole = dsv3.init(cfg, seed=0)
    params = whole if mesh is None else own(whole, cfg, Placement(mesh, make_rules(), own_rank() if rank is None else rank))
    engine = Engine(params, cfg, max_batch=4, max_length=64, block_size=4, chunk=32, speculative=speculative, mesh=mesh)
    requests = [engine.submit(p, Sampling(max_new_tokens=new, temperature=float(i % 2), seed=i)) for i, p in enumerate(prompts)]
    found = {r: [] for r in requests}
    while not engine.idle:
        for event in engine.step():
            found[event.request].append(event.token)
    return [found[r] for r in requests]


if __name__ == "__main__":
    layout, changes, prompts, new, folder = sys.argv[1:]
    start()
    found = texts(Mesh.parse(layout), json.loads(changes), json.loads(prompts), int(new))
    (Path(folder) / f"rank_{own_rank()}.json").write_text(json.dumps(found))
    finish()
