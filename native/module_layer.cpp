// The Python face of a decoder layer's two calls.
#include "module_lowbit.hpp"

namespace lamp::python {
namespace {

using Weight = std::optional<Vector>;

// A decoder layer but for its attention.
class Layer {
 public:
  Layer(std::string isa, const BlockMatrix& qkv, const BlockMatrix& out, const Mlp& mlp, Vector attention_norm,
        Weight after_attention, Vector mlp_norm, Weight after_mlp, Weight query_norm, Weight key_norm, float eps,
        Weight qkv_bias, Weight out_bias, std::ptrdiff_t heads, std::ptrdiff_t kv_heads, std::ptrdiff_t head_size,
        float up_threshold, float down_threshold)
      : kernels_(kernels(isa)),
        kept_{attention_norm, after_attention, mlp_norm, after_mlp, query_norm, key_norm, qkv_bias, out_bias} {
    call_.mlp = mlp.call(), call_.mlp.up_threshold = up_threshold, call_.mlp.down_threshold = down_threshold;
    call_.qkv = qkv.blocks(), call_.out = out.blocks(), call_.hidden = qkv.columns();
    call_.heads = heads, call_.kv_heads = kv_heads, call_.head_size = head_size;
    require(heads > 0 && kv_heads > 0 && head_size > 0 && head_size % 2 == 0, "heads need an even size");
    require(qkv.rows() == (heads + 2 * kv_heads) * head_size && out.columns() == heads * head_size &&
                out.rows() == call_.hidden && call_.mlp.columns == call_.hidden && call_.mlp.outputs == call_.hidden,
            "the matrices do not fit together");
    const auto norm = [&](const Weight& weight, std::ptrdiff_t size) {
      return RmsNorm{vector(weight, size), eps};
    };
    call_.attention_norm = norm(kept_[0], call_.hidden), call_.after_attention = norm(kept_[1], call_.hidden);
    call_.mlp_norm = norm(kept_[2], call_.hidden), call_.after_mlp = norm(kept_[3], call_.hidden);
    call_.query_norm = norm(kept_[4], head_size), call_.key_norm = norm(kept_[5], head_size);
    call_.qkv_bias = vector(kept_[6], qkv.rows()), call_.out_bias = vector(kept_[7], call_.hidden);
  }

  void begin(Floats<2> x, Floats<2> cosines, Floats<2> sines, Array<float, 2> q, Array<float, 2> k, Array<float, 2> v,
             int threads) const {
    LowBitLayer p = call_;
    p.batch = length(x.shape(0)), p.threads = threads;
    const std::ptrdiff_t keys = p.kv_heads * p.head_size;
    require(row_major(x) && length(x.shape(1)) == p.hidden, "x must be contiguous, of shape (batch, hidden)");
    require(fits(q, p.batch, p.heads * p.head_size) && fits(k, p.batch, keys) && fits(v, p.batch, keys),
            "q, k and v must be contiguous, of shape (batch, heads * head size)");
    require(length(cosines.shape(1)) == p.head_size && length(sines.shape(1)) == p.head_size && row_major(cosines) &&
                row_major(sines) && cosines.shape(0) == sines.shape(0) &&
                (cosines.shape(0) == 1 || length(cosines.shape(0)) == p.batch),
            "cosines and sines must be contiguous, of shape (batch or 1, head size)");
    p.x = x.data(), p.q = q.data(), p.k = k.data(), p.v = v.data();
    p.cosines = cosines.data(), p.sines = sines.data(), p.angle_stride = cosines.shape(0) == 1 ? 0 : p.head_size;
    const nb::gil_scoped_release release;
    kernels_.lowbit.layer_begin(p);
  }

  std::tuple<std::int64_t, std::int64_t> end(Floats<2> x, Floats<2> attended, Array<float, 2> y, int threads) const {
    LowBitLayer p = call_;
    p.batch = length(x.shape(0)), p.threads = threads;
    require(row_major(x) && length(x.shape(1)) == p.hidden, "x must be contiguous, of shape (batch, hidden)");
    require(row_major(attended) && length(attended.shape(0)) == p.batch &&
                length(attended.shape(1)) == p.heads * p.head_size,
            "attended must be contiguous, of shape (batch, heads * head size)");
    require(fits(y, p.batch, p.hidden), "y must be contiguous, of shape (batch, hidden)");
    std::int64_t selected[2] = {0, 0};
    p.x = x.data(), p.attended = attended.data(), p.y = y.data(), p.mlp.selected = selected;
    {
      const nb::gil_scoped_release release;
      kernels_.lowbit.layer_end(p);
    }
    return {selected[0], selected[1]};
  }

 private:
  static float* vector(const Weight& weight, std::ptrdiff_t size) {
    if (!weight) return nullptr;
    require(row_major(*weight) && length(weight->size()) == size, "a norm or bias must be contiguous and fit");
    return weight->data();
  }
  static bool fits(const Array<float, 2>& x, std::ptrdiff_t rows, std::ptrdiff_t columns) {
    return row_major(x) && length(x.shape(0)) == rows && length(x.shape(1)) == columns;
  }

  const Kernels& kernels_;
  Weight kept_[8];
  LowBitLayer call_;
};

}  // namespace

void bind_layer(nb::module_& m) {
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<std::string, const BlockMatrix&, const BlockMatrix&, const Mlp&, Vector, Weight, Vector, Weight,
                    Weight, Weight, float, Weight, Weight, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, float,
                    float>(),
           "isa"_a, "qkv"_a, "out"_a, "mlp"_a, "attention_norm"_a, "after_attention"_a.none(), "mlp_norm"_a,
           "after_mlp"_a.none(), "query_norm"_a.none(), "key_norm"_a.none(), "eps"_a, "qkv_bias"_a.none(),
           "out_bias"_a.none(), "heads"_a, "kv_heads"_a, "head_size"_a, "up_threshold"_a, "down_threshold"_a,
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("begin", &Layer::begin, "x"_a, "cosines"_a, "sines"_a, "q"_a, "k"_a, "v"_a, "threads"_a)
      .def("end", &Layer::end, "x"_a, "attended"_a, "y"_a, "threads"_a);
}

}  // namespace lamp::python
