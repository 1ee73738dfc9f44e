// Samples of strided maps of any dtype, read into planes of T and written back.
#pragma once

#include "convert.h"
#include "taps.h"

namespace infopro::INFOPRO_ISA {

template <class T, class S>
INLINE void read_maps_of(const S* from, const Maps& m, int64_t channels, int64_t rows, int64_t columns, T* to,
                         int64_t plane, int64_t pitch) {
  if constexpr (__is_same(T, S)) {
    if (m.c == 1 && m.x > 1) {  // channels_last
      bool whole = m.y == columns * m.x && pitch == columns;
      for (int64_t y = 0; y < (whole ? 1 : rows); y++)
        transpose(from + y * m.y, m.x, whole ? rows * columns : columns, channels, to + y * pitch, plane);
      return;
    }
  }
  if (m.x == 1 && m.y == columns && pitch == columns) {
    for (int64_t c = 0; c < channels; c++) read_strided(to + c * plane, from + c * m.c, 1, rows * columns);
    return;
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = 0; y < rows; y++)
      read_strided(to + c * plane + y * pitch, from + c * m.c + y * m.y, m.x, columns);
}

// Sample n as planes: channels `plane` apart, rows `pitch` apart.
template <class T>
INLINE void read_maps(const Maps& m, int64_t n, int64_t channels, int64_t rows, int64_t columns, T* to,
                      int64_t plane, int64_t pitch) {
  typed(m.data, m.dtype, [&](auto* data) {
    read_maps_of(data + n * m.n, m, channels, rows, columns, to, plane, pitch);
  });
}

template <class T, class S>
INLINE void write_maps_of(S* to, const Maps& m, int64_t channels, int64_t rows, int64_t columns,
                          const T* from, int64_t plane, int64_t pitch) {
  if constexpr (__is_same(T, S)) {
    if (m.c == 1 && m.x > 1) {  // channels_last
      bool whole = m.y == columns * m.x && pitch == columns;
      for (int64_t y = 0; y < (whole ? 1 : rows); y++)
        transpose(from + y * pitch, plane, channels, whole ? rows * columns : columns, to + y * m.y, m.x);
      return;
    }
  }
  if (m.x == 1 && m.y == columns && pitch == columns) {
    for (int64_t c = 0; c < channels; c++) write_strided(to + c * m.c, from + c * plane, 1, rows * columns);
    return;
  }
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = 0; y < rows; y++)
      write_strided(to + c * m.c + y * m.y, from + c * plane + y * pitch, m.x, columns);
}

template <class T>
INLINE void write_maps(const Maps& m, int64_t n, int64_t channels, int64_t rows, int64_t columns,
                       const T* from, int64_t plane, int64_t pitch) {
  typed(m.data, m.dtype, [&](auto* data) {
    write_maps_of(data + n * m.n, m, channels, rows, columns, from, plane, pitch);
  });
}

// Prefetch for sample n of maps without gaps, in `times` steps; none if there is no such sample.
INLINE Ahead sample_ahead(const Maps& m, int64_t n, int64_t samples, int64_t numbers, int64_t times) {
  if (n >= samples || m.n != numbers) return {};
  const int64_t size = size_of(m.dtype);
  return {(const char*)m.data + n * m.n * size, numbers * size, times};
}

}  // namespace infopro::INFOPRO_ISA
