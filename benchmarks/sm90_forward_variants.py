"""Forward variants side by side; scratch."""
import sys, time, os
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
import torch
from benchmarks.sm90_dev import timed, made, problem_of, Timed, TOKENS, WIDTH
from fa3_compile.lower.build_nvrtc import load
from fa3_compile.lower.kernels.cuda_sm90 import bind
from fa3_compile.lower.kernels.cuda_sm90_keys import keys_of, layout_of
from fa3_compile.lower import launch_cuda

def case_of(name):
    if name == "full1k":
        return Timed("full", f"score={128**-0.5}*s", 128, 1024, 1.0)
    if name == "full8k":
        return Timed("full", f"score={128**-0.5}*s", 128, 8192, 1.0)
    if name.startswith("ragged"):
        return replace(case_of("documents"), name=name)
    if name == "squares":
        m = "&".join(f" (abs({f}(floordiv(q, 64), 16) - {f}(floordiv(kv, 64), 16)) <= 2) " for f in ("floordiv", "mod"))
        return Timed(name, f"score={128**-0.5}*s, mask={m.strip()}", 128, 8192, squares())
    if name == "streaming":
        n = 8192; seen = sum(min(q + 1, 1025) + max(min(64, q - 1024), 0) for q in range(n))
        return Timed(name, f"score={128**-0.5}*s, mask=(kv - q <= 0) & ((kv < 64) | (q - kv <= 1024))", 128, n, seen / n / n)
    for c in timed():
        if name == f"{c.name} {c.dim} {c.length}": return c
    if name == "bias causal":
        c = case_of("bias")
        return replace(c, name=name, fields=c.fields + ", mask=(kv - q <= 0)", share=0.5)
    return next(c for c in timed() if c.name == name and c.length == 8192)

def squares():
    i = torch.arange(8192) // 64
    return float(((i[:, None] // 16 - i // 16).abs() <= 2).logical_and((i[:, None] % 16 - i % 16).abs() <= 2).double().mean())

def closed(key):
    """Bounds in closed form in place of kept lists."""
    from fa3_compile.lower import render_cuda
    from fa3_compile.lower.kernels import cuda_sm90_lists
    from fa3_compile.spec.blocks import may_have_holes
    f = (lambda m: False) if "CLOSED" in key.config.tries else may_have_holes
    render_cuda.may_have_holes = cuda_sm90_lists.may_have_holes = f

def inputs(name, device):
    c = case_of(name)
    spec, q, k, v, aux = made(c, device)
    share = c.share
    if name.startswith("ragged"):
        g = torch.Generator().manual_seed(3)
        cuts = torch.randint(0, 8192, (2, 7), generator=g).sort(1).values
        ids = (torch.arange(8192)[None, :, None] >= cuts[:, None]).sum(-1)
        counts = torch.stack([torch.bincount(x, minlength=8) for x in ids]).double()
        share = float((counts**2).sum() / (2 * 8192.0**2))
        aux = [ids.to(device)]
    return c, share, spec, q, k, v, aux

def keys_for(name, changes):
    c, share, spec, q, k, v, aux = inputs(name, "meta")
    p = problem_of(spec, q, k, v, aux)
    base = keys_of(p, layout_of(spec, aux))[0]
    return [replace(base, config=replace(base.config, **x)) for x in changes]

def _build(key):
    torch.set_num_threads(1)
    closed(key)
    try:
        b = load(key)
        return b.spill_bytes, b.serialised
    except Exception as e:
        return str(e)[-300:], None

class Overlapped:
    """A launch that may begin before the one before it ends."""
    def __init__(self, launch):
        cu = launch_cuda.driver()
        kernel, *grid, tx, ty, tz, shared = launch._arguments
        self.l, self.cu, self.kernel = launch, cu, kernel
        self.cfg = cu.CUlaunchConfig()
        self.cfg.gridDimX, self.cfg.gridDimY, self.cfg.gridDimZ = grid
        self.cfg.blockDimX, self.cfg.blockDimY, self.cfg.blockDimZ = tx, ty, tz
        self.cfg.sharedMemBytes = shared
        a = cu.CUlaunchAttribute()
        a.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        a.value.programmaticStreamSerializationAllowed = 1
        self.cfg.attrs = [a]; self.cfg.numAttrs = 1
    def __call__(self, stream, addresses):
        for w, i in self.l._copied: self.l._words[w] = addresses[i]
        for w, i, m in self.l._moved: self.l._words[w] = addresses[i] + m
        self.cfg.hStream = stream
        (s,) = self.cu.cuLaunchKernelEx(self.cfg, self.kernel, self.l._pointer, 0)
        assert s.value == 0, s

def interleaved(functions, rounds):
    for f in functions * 2: f()
    ev = [[] for _ in functions]
    for _ in range(rounds):
        for f, r in zip(functions, ev):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(60000)  # the host is ahead
            a.record(); f(); b.record(); r.append((a, b))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) for a, b in r)[len(r) // 2] for r in ev]

def go(name, changes, rounds=25, parts=False):
    c, share, spec, q, k, v, aux = inputs(name, "cuda")
    p = problem_of(spec, q, k, v, aux)
    calls, labels, first = [], [], None
    for key, change in zip(keys_for(name, changes), changes):
        closed(key)
        b = load(key)
        label = " ".join([f"{key.config.block_m}x{key.config.block_n}x{key.config.stages}",
            *(f"{n}={x}" for n, x in change.items() if n in ("longest_first", "ping_pong")),
            *key.config.tries, f"spill{b.spill_bytes}" if b.spill_bytes else "", "SERIAL" if b.serialised else ""])
        bound = bind(p, q, k, v, aux, (), key)
        if "PDL" in key.config.tries:
            bound.launches = (bound.launches[0], Overlapped(bound.launches[1]), *bound.launches[2:])
        out, lse = bound(q, k, v, aux)
        torch.cuda.synchronize()
        if first is None: first = out, lse
        d = (out.float() - first[0].float()).abs().max().item(), (lse - first[1]).abs().max().item()
        calls.append(lambda b=bound: b(q, k, v, aux)); labels.append((label, d))
        if parts and not change:
            stream = torch._C._cuda_getCurrentRawStream(0)
            o, l = torch.empty_like(out), torch.empty_like(lse)
            w = torch.empty(bound.scratch_words, dtype=torch.int32, device="cuda")
            ctr = bound.module.counter(stream)[0]
            ad = [q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), l.data_ptr(), ctr, w.data_ptr(), w.data_ptr(), *(x.data_ptr() for x in aux)]
            for i, x in enumerate(bound.launches):
                calls.append(lambda x=x, ad=ad: x(stream, ad)); labels.append((f"launch {i} alone", (0, 0)))
    work = 4 * TOKENS * c.length * WIDTH * share
    for (label, d), ms in zip(labels, interleaved(calls, rounds)):
        print(f"{name:11s} {label:60s} {ms*1e3:8.1f} us {work/ms/1e9:6.0f} TF  diff {d[0]:.1e} {d[1]:.1e}", flush=True)

def cross(**axes):
    found = [{}]
    for n, values in axes.items(): found = [{**x, n: y} for x in found for y in values]
    return found

def plan():
    P, L, B, Q, X = ("PLAIN_START",), ("LDMATRIX",), ("BITS",), ("QREG",), ("PDL",)
    full = dict(block_m=128, block_n=128)
    masks = [{}, dict(tries=P), dict(tries=P + B), dict(tries=P + Q), dict(tries=P + B + Q)]
    found = {n: masks for n in ("documents", "ragged", "padded causal", "dense mask", "squares")}
    found["ragged"] = masks + [dict(tries=P + B, block_n=96), dict(tries=P + B + Q, block_n=96), dict(tries=P + B, block_n=64)]
    for n in ("bias", "bias causal"):
        found[n] = [{}, dict(tries=L), dict(tries=Q), dict(tries=L + Q), dict(tries=L + Q, ping_pong=False)]
    for n in ("full1k", "full8k", "full 128 2048", "causal 128 2048", "causal 128 16384", "softcap 128 8192", "alibi 128 8192", "window1024 128 8192", "prefix1024 128 8192"):
        found[n] = [{}, full, {**full, "tries": Q}] + ([dict(tries=("MERGED",))] if n.startswith(("causal", "window")) else [])
    return found

if __name__ == "__main__":
    wanted = sys.argv[1:]
    todo = {n: c for n, c in plan().items() if not wanted or n in wanted}
    t = time.time()
    keys = [k for n, c in todo.items() for k in keys_for(n, c)]
    with ProcessPoolExecutor(min(16, os.cpu_count())) as pool: said = list(pool.map(_build, keys))
    print("built", len(keys), f"{time.time() - t:.0f} s", [s for s in said if not isinstance(s[0], int)], flush=True)
    if "build" in os.environ: sys.exit()
    for n, c in todo.items():
        try: go(n, c, parts=n == "documents")
        except Exception as e: print(n, "FAILED", repr(e)[:500], flush=True)
        torch.cuda.empty_cache()
