// Copies blocks and computes the XXH3-128 of each (seed 0, default secret) in the same pass.
//
// The digest is of the bytes as they went through the registers into the destination; the source is
// read once, so that a source which changes meanwhile cannot yield a digest of other bytes than
// those that were stored. Blocks are longer than 240 bytes: shorter inputs have another algorithm.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using u8 = unsigned char;
using u64 = std::uint64_t;
using u128 = unsigned __int128;

constexpr u64 P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
constexpr u64 P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u,
              P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;
constexpr std::int64_t STRIPE = 64, SECRET = 192, SEGMENT = 1024;
constexpr int STRIPES = 16;  // of a segment: (SECRET - STRIPE) / 8

alignas(64) constexpr u8 secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline u64 load64(const u8* from) {
    u64 value;
    std::memcpy(&value, from, 8);
    return value;
}

inline void store64_big_endian(u8* to, u64 value) {
    value = __builtin_bswap64(value);
    std::memcpy(to, &value, 8);
}

// The eight 64-bit lanes. `take` loads a stripe, stores it at `to` unless that is null, and adds it.
#if defined(__AVX512F__)
struct Lanes {
    __m512i acc;
    explicit Lanes(const u64* start) : acc(_mm512_loadu_si512(start)) {}
    inline void take(const u8* from, u8* to, const u8* key) {
        const __m512i data = _mm512_loadu_si512(from);
        if (to) _mm512_storeu_si512(to, data);
        const __m512i mixed = _mm512_xor_si512(data, _mm512_loadu_si512(key));
        const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
        acc = _mm512_add_epi64(acc, _mm512_shuffle_epi32(data, _MM_PERM_BADC));
        acc = _mm512_add_epi64(acc, product);
    }
    void save(u64* out) const { _mm512_storeu_si512(out, acc); }
};
#elif defined(__AVX2__)
struct Lanes {
    __m256i acc[2];
    explicit Lanes(const u64* start) {
        for (int h = 0; h < 2; ++h)
            acc[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + 4 * h));
    }
    inline void take(const u8* from, u8* to, const u8* key) {
        for (int h = 0; h < 2; ++h) {
            const __m256i data =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * h));
            if (to) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h), data);
            const __m256i mixed = _mm256_xor_si256(
                data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + 32 * h)));
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            acc[h] = _mm256_add_epi64(acc[h], _mm256_shuffle_epi32(data, 0x4E));
            acc[h] = _mm256_add_epi64(acc[h], product);
        }
    }
    void save(u64* out) const {
        for (int h = 0; h < 2; ++h)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * h), acc[h]);
    }
};
#else
struct Lanes {
    u64 acc[8];
    explicit Lanes(const u64* start) { std::memcpy(acc, start, sizeof acc); }
    inline void take(const u8* from, u8* to, const u8* key) {
        u64 data[8];
        std::memcpy(data, from, sizeof data);
        if (to) std::memcpy(to, data, sizeof data);
        for (int i = 0; i < 8; ++i) {
            const u64 mixed = data[i] ^ load64(key + 8 * i);
            acc[i] += data[i ^ 1] + (mixed & 0xFFFFFFFFu) * (mixed >> 32);
        }
    }
    void save(u64* out) const { std::memcpy(out, acc, sizeof acc); }
};
#endif

u64 merged(const u64* acc, const u8* key, u64 start) {
    for (int i = 0; i < 4; ++i) {
        const u128 product =
            u128(acc[2 * i] ^ load64(key + 16 * i)) * (acc[2 * i + 1] ^ load64(key + 16 * i + 8));
        start += u64(product) ^ u64(product >> 64);
    }
    start ^= start >> 37;
    start *= 0x165667919E3779F9u;
    return start ^ (start >> 32);
}

void copy_and_digest(const u8* from, u8* to, std::int64_t bytes, u8* digest) {
    u64 acc[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const std::int64_t segments = (bytes - 1) / SEGMENT;
    for (std::int64_t s = 0; s < segments; ++s) {
        const std::int64_t at = s * SEGMENT;
        Lanes lanes(acc);
        for (int stripe = 0; stripe < STRIPES; ++stripe) {
            const std::int64_t offset = at + stripe * STRIPE;
            lanes.take(from + offset, to ? to + offset : nullptr, secret + 8 * stripe);
        }
        lanes.save(acc);
        for (int i = 0; i < 8; ++i)
            acc[i] = (acc[i] ^ (acc[i] >> 47) ^ load64(secret + SECRET - STRIPE + 8 * i)) * P32_1;
    }
    // The rest goes through a buffer: its last stripe overlaps what was read before.
    alignas(64) u8 rest[SEGMENT + STRIPE];
    const std::int64_t at = segments * SEGMENT, left = bytes - at;
    const std::int64_t before = segments ? STRIPE : 0;
    if (before) std::memcpy(rest, to ? to + at - STRIPE : from + at - STRIPE, STRIPE);
    std::memcpy(rest + before, from + at, left);
    if (to) std::memcpy(to + at, rest + before, left);
    Lanes lanes(acc);
    const int stripes = int((left - 1) / STRIPE);
    for (int stripe = 0; stripe < stripes; ++stripe)
        lanes.take(rest + before + stripe * STRIPE, nullptr, secret + 8 * stripe);
    lanes.take(rest + before + left - STRIPE, nullptr, secret + SECRET - STRIPE - 7);
    lanes.save(acc);
    store64_big_endian(digest, merged(acc, secret + SECRET - STRIPE - 11, ~(u64(bytes) * P64_2)));
    store64_big_endian(digest + 8, merged(acc, secret + 11, u64(bytes) * P64_1));
}

}  // namespace

extern "C" {

// `to` and `to_rows` may be null: digests alone. `digests` may be null: copy alone.
void verified_copy(const u8* from, const std::int64_t* from_rows, u8* to,
                   const std::int64_t* to_rows, std::int64_t count, std::int64_t bytes,
                   u8* digests) {
    for (std::int64_t i = 0; i < count; ++i) {
        const u8* source = from + from_rows[i] * bytes;
        u8* target = to ? to + to_rows[i] * bytes : nullptr;
        if (digests)
            copy_and_digest(source, target, bytes, digests + 16 * i);
        else if (target)
            std::memcpy(target, source, bytes);
    }
}
}
