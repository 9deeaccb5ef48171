#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    woracle_fuzz::target("record")(bytes);
});
