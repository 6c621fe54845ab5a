// The Python face of the low-bit kernels.
#include "bindings/lowbit.hpp"

namespace lamp::python {
namespace {

std::tuple<std::int64_t, std::int64_t> head(const std::string& isa, const BlockMatrix& matrix, Table rows, Floats<2> x,
                                            Array<float, 2> logits, float largest_norm, float largest_error,
                                            std::ptrdiff_t top, float threshold, int threads) {
  LowBitHead p;
  p.head = matrix.blocks();
  p.tokens = matrix.rows();
  p.columns = matrix.columns();
  p.full = full(rows, p.tokens, p.columns);
  require(row_major(x) && length(x.shape(1)) == p.columns, "x must be contiguous, of shape (vectors, columns)");
  require(row_major(logits) && logits.shape(0) == x.shape(0) && length(logits.shape(1)) == p.tokens,
          "logits must be contiguous, of shape (vectors, tokens)");
  require(top >= 1, "top must be at least 1");
  std::int64_t selected[2];
  p.vectors = length(x.shape(0));
  p.top = top;
  p.largest_norm = largest_norm;
  p.largest_error = largest_error;
  p.threshold = threshold;
  p.x = x.data();
  p.logits = logits.data();
  p.selected = selected;
  p.threads = threads;
  const Kernels& k = kernels(isa);
  {
    const nb::gil_scoped_release release;
    k.lowbit.head(p);
  }
  return {selected[0], selected[1]};
}

}  // namespace

void bind_lowbit(nb::module_& m) {
  nb::class_<BlockMatrix>(m, "BlockMatrix")
      .def(nb::init<std::string, Bytes, Halves, Vector, int, std::ptrdiff_t, std::ptrdiff_t>(), "isa"_a, "codes"_a,
           "scales"_a, "errors"_a, "bits"_a, "rows"_a, "columns"_a)
      .def("pack", &BlockMatrix::pack, "x"_a, "threads"_a)
      .def("products", &BlockMatrix::products, "x"_a, "y"_a, "threads"_a);
  nb::class_<Mlp>(m, "Mlp")
      .def(nb::init<std::string, const BlockMatrix&, const BlockMatrix&, const BlockMatrix&, Table, Table, Table, Vector,
                    Vector, int>(),
           "isa"_a, "gate"_a, "up"_a, "down"_a, "gate_full"_a, "up_full"_a, "down_full"_a, "down_norms"_a,
           "down_errors"_a, "activation"_a, nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("run", &Mlp::run, "x"_a, "y"_a, "up_threshold"_a, "down_threshold"_a, "threads"_a);
  bind_layer(m);
  m.def("head", &head, "isa"_a, "matrix"_a, "rows"_a, "x"_a, "logits"_a, "largest_norm"_a, "largest_error"_a, "top"_a,
        "threshold"_a, "threads"_a);
}

}  // namespace lamp::python
