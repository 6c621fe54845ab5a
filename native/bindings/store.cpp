// The Python face of the decoding kernels.
#include "bindings/store.hpp"

namespace lamp::python {

void bind_decode(nb::module_& m) {
  nb::class_<KeyValueStore>(m, "KeyValueStore")
      .def(nb::init<std::string, Bytes, Halves, Array<float, 1>, Bytes, Halves, Full4, Full4,
                    std::optional<Floats<1>>, int, int, bool>(),
           "isa"_a, "key_codes"_a, "key_scales"_a, "key_errors"_a, "value_codes"_a, "value_scales"_a, "full_keys"_a,
           "full_values"_a, "mean"_a.none(), "key_bits"_a, "value_bits"_a, "rotated"_a)
      .def("append", &KeyValueStore::append, "k"_a, "v"_a, "start"_a, "threads"_a)
      .def("attend", &KeyValueStore::attend, "q"_a, "out"_a, "recomputed"_a, "full_rows"_a, "visible"_a, "first"_a,
           "last"_a, "mask"_a.none(), "causal"_a, "sinks"_a.none(), "scaling"_a, "softcap"_a, "scores_threshold"_a,
           "values_threshold"_a, "nonfinite_values"_a, "threads"_a);
}

}  // namespace lamp::python
