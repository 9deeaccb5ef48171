//! `adapter_config.json`: read, asked everything, and read again as it is written.

use woracle::peft::AdapterConfig;

pub fn run(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(config) = AdapterConfig::parse(text) else { return false };
    for module in ["model.layers.0.self_attn.q_proj", "fc", ""] {
        let _ = (config.rank(module), config.scaling(module));
    }
    let _ = (config.warnings(), config.method(), config.target_pattern(), config.modules_to_save());
    let again = AdapterConfig::parse(&config.to_json()).expect("what was written");
    assert_eq!(again.fields(), config.fields());
    true
}
