// What the files that know Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastrl {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_attention(pybind11::module_& m);
void bind_decode(pybind11::module_& m);
void bind_layers(pybind11::module_& m);
void bind_logprob(pybind11::module_& m);
void bind_quant(pybind11::module_& m);
void bind_scan(pybind11::module_& m);

}  // namespace fastrl
