// The Python face of the kernels: checks shapes, turns DLPack tensors into plain pointers, drops the GIL, calls.
#include "bindings/module.hpp"

#include "pool.hpp"

namespace lamp {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace lamp

namespace {

using namespace lamp::python;

// (mantissa_bits, min_exponent, max_exponent, top_codes_lost, overflow, subnormals, signed, negative_zero,
//  fused, block, promote, and of a unit: length, bits, nearest, floor_a, floor_b, zero_exponent)
using How = std::tuple<int, int, int, int, int, bool, bool, bool, bool, int, int, int, int, bool,
                       int, int, int>;

lamp::Accumulation accumulation(const How& h) {
  lamp::Accumulation a;
  a.grid = {std::get<0>(h), std::get<1>(h), std::get<2>(h), std::get<3>(h), static_cast<lamp::Overflow>(std::get<4>(h)),
            std::get<5>(h), std::get<6>(h), std::get<7>(h)};
  a.fused = std::get<8>(h);
  a.block = std::get<9>(h);
  a.promote = std::get<10>(h);
  a.fuse = {std::get<11>(h), std::get<12>(h), std::get<13>(h), std::get<14>(h), std::get<15>(h), std::get<16>(h)};
  if (a.grid.mantissa_bits < 1 || a.grid.mantissa_bits > 23 || a.block < 1 || a.promote < 0 ||
      a.fuse.length < 0 || a.fuse.length > 1024 || a.fuse.bits < 1 || a.fuse.bits > 40)
    throw std::invalid_argument("accumulation out of range");
  return a;
}

// The operands that products and recompute share.
template <class P>
void set_operands(P& p, const Floats<3>& a, const Floats<3>& b) {
  require(b.shape(0) > 0 && a.shape(0) % b.shape(0) == 0, "the batch of a must be a multiple of the batch of b");
  require(a.shape(2) == b.shape(1), "a and b must share their inner dimension");
  p.a = a.data();
  p.b = b.data();
  p.G = length(a.shape(0));
  p.M = length(a.shape(1));
  p.K = length(a.shape(2));
  p.N = length(b.shape(2));
  p.group = p.G / length(b.shape(0));
  p.a_batch = a.stride(0);
  p.a_row = a.stride(1);
  p.a_k = a.stride(2);
  p.b_batch = b.stride(0);
  p.b_k = b.stride(1);
  p.b_column = b.stride(2);
}

void products(const std::string& isa, Floats<3> a, Floats<3> b, Array<float, 3> out,
              std::optional<Array<float, 3>> squares, const How& how, std::optional<float> scaling,
              std::optional<std::int64_t> causal, int threads) {
  lamp::Products p;
  set_operands(p, a, b);
  const auto fits = [&](const Array<float, 3>& x) {
    return row_major(x) && length(x.shape(0)) == p.G && length(x.shape(1)) == p.M && length(x.shape(2)) == p.N;
  };
  require(fits(out), "out must be contiguous, of shape (G, M, N)");
  p.out = out.data();
  if (squares) {
    require(fits(*squares), "squares must be contiguous, of shape (G, M, N)");
    p.squares = squares->data();
  }
  p.scaled = scaling.has_value();
  p.scaling = scaling.value_or(1.0f);
  p.causal = causal.has_value();
  p.offset = static_cast<std::ptrdiff_t>(causal.value_or(0));
  p.accumulation = accumulation(how);
  p.threads = threads;
  const lamp::Kernels& k = kernels(isa);
  const nb::gil_scoped_release release;
  k.products(p);
}

void recompute(const std::string& isa, Array<float, 3> scores, Floats<3> a, Floats<3> b,
               Array<const std::uint8_t, 3> mask, std::optional<float> scaling, int threads) {
  lamp::Recompute p;
  set_operands(p, a, b);
  require(row_major(scores) && length(scores.shape(0)) == p.G && length(scores.shape(1)) == p.M &&
              length(scores.shape(2)) == p.N,
          "scores must be contiguous, of shape (G, M, N)");
  require(length(mask.shape(0)) == p.G && length(mask.shape(1)) == p.M && length(mask.shape(2)) == p.N &&
              (mask.stride(2) == 1 || p.N <= 1),
          "mask must have shape (G, M, N) and a contiguous last dimension");
  p.scores = scores.data();
  p.mask = mask.data();
  p.mask_batch = mask.stride(0);
  p.mask_row = mask.stride(1);
  p.scaled = scaling.has_value();
  p.scaling = scaling.value_or(1.0f);
  p.threads = threads;
  const lamp::Kernels& k = kernels(isa);
  const nb::gil_scoped_release release;
  k.recompute(p);
}

lamp::HeadRows head_rows(const Floats<4>& x) { return {x.data(), x.stride(0), x.stride(1), x.stride(2)}; }

bool has_shape(const Floats<4>& x, std::ptrdiff_t batch, std::ptrdiff_t heads, std::ptrdiff_t rows,
               std::ptrdiff_t size) {
  return length(x.shape(0)) == batch && length(x.shape(1)) == heads && length(x.shape(2)) == rows &&
         length(x.shape(3)) == size && (size <= 1 || x.stride(3) == 1);
}

// A number for each row of each head.
const float* row_numbers(const std::optional<Floats<3>>& x, std::ptrdiff_t batch, std::ptrdiff_t heads,
                         std::ptrdiff_t rows, const char* message) {
  if (!x) return nullptr;
  require(row_major(*x) && length(x->shape(0)) == batch && length(x->shape(1)) == heads && length(x->shape(2)) == rows,
          message);
  return x->data();
}

// Of the weights that look to the residual stream: factor, mapped values, their squares, scale.
using ResidualArrays = std::tuple<Floats<3>, Floats<4>, Floats<3>, Floats<2>>;
// Of the weights with a bridge: squares of the norms of queries and keys, factors of y^2 and of their product.
using BridgeArrays = std::tuple<Floats<3>, Floats<3>, float, float>;

void set_bridge(lamp::Attention& p, const std::optional<BridgeArrays>& bridge) {
  require(bridge.has_value() == p.is_bridge(), "a weight with a bridge needs squares of norms, no other weight takes them");
  if (!bridge) return;
  const auto& [of_q, of_k, score_part, norm_part] = *bridge;
  p.q_squares = row_numbers(of_q, p.B, p.H, p.Lq, "squares of queries must be contiguous, of shape (B, H, Lq)");
  p.k_squares = row_numbers(of_k, p.B, p.Hkv, p.Lk, "squares of keys must be contiguous, of shape (B, Hkv, Lk)");
  p.score_part = score_part;
  p.norm_part = norm_part;
}

void set_residual(lamp::Attention& p, const std::optional<ResidualArrays>& residual) {
  require(residual.has_value() == p.is_residual(),
          "a weight that looks to the residual stream needs a factor and a scale, no other weight takes them");
  if (!residual) return;
  const auto& [factor, mapped, squares, scale] = *residual;
  require(has_shape(mapped, p.B, p.H, p.Lk, p.Dv),
          "mapped values must have the shape (B, H, Lk, Dv) and a contiguous last dimension");
  require(row_major(scale) && length(scale.shape(0)) == p.B && length(scale.shape(1)) == p.Lq,
          "scale must be contiguous, of shape (B, Lq)");
  p.residual = {row_numbers(factor, p.H, p.Dv, p.Dv, "factor must be contiguous, of shape (H, Dv, Dv)"),
                head_rows(mapped),
                row_numbers(squares, p.B, p.H, p.Lk, "mapped squares must be contiguous, of shape (B, H, Lk)"),
                scale.data()};
}

void attention(const std::string& isa, Floats<4> q, Floats<4> k, Floats<4> v, std::optional<Floats<4>> exact_q,
               std::optional<Floats<4>> exact_k, std::optional<Floats<3>> shift, std::optional<Floats<3>> row_error,
               std::optional<Floats<3>> key_error, Array<float, 4> out, Array<std::int32_t, 3> selected, Array<std::int32_t, 3> visible,
               std::optional<Array<std::uint8_t, 4>> blocks, std::optional<Array<const std::uint8_t, 3>> mask,
               std::optional<Floats<1>> sinks, bool causal, float scaling, float softcap, int weight, double threshold,
               bool by_length, float error_scale, const std::optional<BridgeArrays>& bridge,
               const std::optional<ResidualArrays>& residual, std::optional<Floats<3>> draws, const How& how, int threads) {
  lamp::Attention p;
  p.B = length(q.shape(0));
  p.H = length(q.shape(1));
  p.Lq = length(q.shape(2));
  p.D = length(q.shape(3));
  p.Hkv = length(k.shape(1));
  p.Lk = length(k.shape(2));
  p.Dv = length(v.shape(3));
  require(p.Hkv > 0 && p.H % p.Hkv == 0 && has_shape(q, p.B, p.H, p.Lq, p.D) && has_shape(k, p.B, p.Hkv, p.Lk, p.D) &&
              has_shape(v, p.B, p.Hkv, p.Lk, p.Dv),
          "q, k and v must fit together and be contiguous in their last dimension");
  require((!exact_q || has_shape(*exact_q, p.B, p.H, p.Lq, p.D)) &&
              (!exact_k || has_shape(*exact_k, p.B, p.Hkv, p.Lk, p.D)),
          "exact operands must have the shapes of q and k and a contiguous last dimension");
  require(row_error.has_value() == key_error.has_value(), "row_error and key_error come together");
  require(row_major(out) && length(out.shape(0)) == p.B && length(out.shape(1)) == p.Lq &&
              length(out.shape(2)) == p.H && length(out.shape(3)) == p.Dv,
          "out must be contiguous, of shape (B, Lq, H, Dv)");
  require(row_major(selected) && length(selected.shape(0)) == p.B && length(selected.shape(1)) == p.H &&
              length(selected.shape(2)) == p.Lq,
          "selected must be contiguous, of shape (B, H, Lq)");
  require(row_major(visible) && length(visible.shape(0)) == p.B && length(visible.shape(1)) == p.Lq &&
              visible.shape(2) == 2,
          "visible must be contiguous, of shape (B, Lq, 2)");
  require(weight >= 0 && weight <= static_cast<int>(lamp::RuleWeight::bridge_residual), "unknown weight");
  p.q = head_rows(q);
  p.k = head_rows(k);
  p.v = head_rows(v);
  if (exact_q) p.exact_q = head_rows(*exact_q);
  if (exact_k) p.exact_k = head_rows(*exact_k);
  p.shift = row_numbers(shift, p.B, p.H, p.Lq, "shift must be contiguous, of shape (B, H, Lq)");
  p.row_error = row_numbers(row_error, p.B, p.H, p.Lq, "row_error must be contiguous, of shape (B, H, Lq)");
  p.key_error = row_numbers(key_error, p.B, p.Hkv, p.Lk, "key_error must be contiguous, of shape (B, Hkv, Lk)");
  p.out = out.data();
  p.selected = selected.data();
  p.visible = visible.data();
  if (blocks) {  // all zero
    require(row_major(*blocks) && length(blocks->shape(0)) == p.B && length(blocks->shape(1)) == p.H &&
                length(blocks->shape(2)) == p.Lq &&
                length(blocks->shape(3)) == (p.Lk + lamp::kBlockKeys - 1) / lamp::kBlockKeys,
            "blocks must be contiguous, of shape (B, H, Lq, ceil(Lk / 16))");
    p.blocks = blocks->data();
  }
  if (mask) {
    require(length(mask->shape(0)) == p.B && length(mask->shape(1)) == p.Lq && length(mask->shape(2)) == p.Lk &&
                (p.Lk <= 1 || mask->stride(2) == 1) && !causal,
            "mask must have shape (B, Lq, Lk), a contiguous last dimension, and no causal flag beside it");
    p.mask = mask->data();
    p.mask_batch = mask->stride(0);
    p.mask_row = mask->stride(1);
  }
  if (sinks) {
    require(length(sinks->shape(0)) == p.H && row_major(*sinks), "sinks must be contiguous, of shape (H,)");
    p.sinks = sinks->data();
  }
  p.causal = causal;
  p.scaling = scaling;
  p.softcap = softcap;
  p.weight = static_cast<lamp::RuleWeight>(weight);
  p.threshold = threshold;
  p.by_length = by_length;
  p.error_scale = error_scale;
  set_bridge(p, bridge);
  set_residual(p, residual);
  p.draws = row_numbers(draws, p.H, p.Lq, p.Lk, "draws must be contiguous, of shape (H, Lq, Lk)");
  p.accumulation = accumulation(how);
  p.threads = threads;
  const lamp::Kernels& kernel = kernels(isa);
  const nb::gil_scoped_release release;
  kernel.attention(p);
}

// Ctrl-C while a kernel runs: Python's signal handlers run, and what they raise ends the call.
void check_signals() {
  const nb::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

}  // namespace

NB_MODULE(_native, m) {
  lamp::set_interruption(&check_signals);
  m.doc() = "Native kernels of torchlamp; torchlamp.kernels is their documented face.";
  m.def("supports", &lamp::supports, "isa"_a);
  m.def("products", &products, "isa"_a, "a"_a, "b"_a, "out"_a, "squares"_a.none(), "how"_a, "scaling"_a.none(),
        "causal"_a.none(), "threads"_a);
  m.def("recompute", &recompute, "isa"_a, "scores"_a, "a"_a, "b"_a, "mask"_a, "scaling"_a.none(), "threads"_a);
  m.def("attention", &attention, "isa"_a, "q"_a, "k"_a, "v"_a, "exact_q"_a.none(), "exact_k"_a.none(),
        "shift"_a.none(), "row_error"_a.none(), "key_error"_a.none(), "out"_a, "selected"_a, "visible"_a,
        "blocks"_a.none(), "mask"_a.none(), "sinks"_a.none(), "causal"_a, "scaling"_a, "softcap"_a, "weight"_a, "threshold"_a, "by_length"_a,
        "error_scale"_a, "bridge"_a.none(), "residual"_a.none(), "draws"_a.none(), "how"_a, "threads"_a);
  lamp::python::bind_lowbit(m);
  lamp::python::bind_decode(m);
  lamp::python::bind_constants(m);
}
