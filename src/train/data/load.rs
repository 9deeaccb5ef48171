//! From a configuration to a data set.

use super::{DataConfig, Dataset, Source, Vocabulary, csv, digits, idx, npy, text, transform};
use crate::{Error, Result};
use std::path::Path;

/// The vocabulary over every text among these configurations; `None` where none is a text.
///
/// # Errors
///
/// A text that cannot be read or is not UTF-8.
pub fn vocabulary(configs: &[&DataConfig], directory: &Path) -> Result<Option<Vocabulary>> {
    let files = configs.iter().filter_map(|config| match &config.source {
        Source::Text(files) => Some(text::read(files, directory)),
        _ => None,
    });
    let texts = files.collect::<Result<Vec<_>>>()?;
    Ok((!texts.is_empty()).then(|| Vocabulary::of(texts.iter().flatten().map(|(_, text)| text.as_str()))))
}

/// Reads a data set, the paths relative to `directory`: features `[samples, ..]`, targets `[samples, ..]`. A text
/// without a vocabulary has its own.
///
/// # Errors
///
/// A file that cannot be read or is not what its format demands, with the place of what was found there; settings that
/// do not fit the data.
pub fn load(config: &DataConfig, directory: &Path, vocabulary: Option<&Vocabulary>) -> Result<Dataset> {
    let set = match &config.source {
        Source::Digits => digits::load(),
        Source::Csv(file) => csv::load(file, directory),
        Source::Npy(files) => npy::load(files, directory),
        Source::Npz(file) => npy::load_npz(file, directory),
        Source::Idx(files) => idx::load(files, directory),
        Source::Text(files) if files.paths.is_empty() => {
            Err(Error::Setting { name: "paths", expected: "at least one path".into(), found: "none".into() })
        }
        Source::Text(files) => text::load(files, directory, vocabulary),
    }?;
    transform::prepare(set, config.shape.as_deref(), &config.transform, config.scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{Features, Targets};

    fn config(text: &str) -> DataConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn two_texts_share_one_vocabulary() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.txt"), "abab").unwrap();
        std::fs::write(directory.path().join("b.txt"), "cbcb").unwrap();
        let [a, b] = ["a", "b"].map(|name| config(&format!("format = 'text'\npaths = ['{name}.txt']\ncontext = 3")));
        let vocabulary = vocabulary(&[&a, &config("format = 'digits'"), &b], directory.path()).unwrap().unwrap();
        assert_eq!(vocabulary.chars(), ['a', 'b', 'c']);
        let set = load(&b, directory.path(), Some(&vocabulary)).unwrap();
        assert_eq!(set.features, Features::Ids(ndarray::array![[2, 1, 2]].into_dyn()));
        assert_eq!(set.targets, Targets::Classes(ndarray::array![[1, 2, 1]].into_dyn()));
        assert_eq!(set.classes, Some(3));
    }

    #[test]
    fn without_a_text_there_is_no_vocabulary() {
        assert_eq!(vocabulary(&[&config("format = 'digits'")], Path::new("")).unwrap(), None);
    }

    #[test]
    fn a_table_is_reshaped_as_the_configuration_says() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.csv"), "1,2,3,4,0\n").unwrap();
        let config = config("format = 'csv'\npath = 'a.csv'\nheader = false\nshape = [1, 2, 2]\ntransform = 'flip'");
        let set = load(&config, directory.path(), None).unwrap();
        assert_eq!(set.features, Features::Values(ndarray::array![[[[2.0, 1.0], [4.0, 3.0]]]].into_dyn()));
    }

    #[test]
    fn a_compressed_table_is_read_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(directory.path().join("a.csv.gz")).unwrap();
        let mut file = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        std::io::Write::write_all(&mut file, b"a,y\n0.5,1\n").unwrap();
        file.finish().unwrap();
        let config = config("format = 'csv'\npath = 'a.csv.gz'\nscale = 2.0");
        let set = load(&config, directory.path(), None).unwrap();
        assert_eq!(set.features, Features::Values(ndarray::array![[1.0]].into_dyn()));
        assert_eq!((set.targets, set.classes), (Targets::Classes(ndarray::array![1].into_dyn()), Some(2)));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let refused = |text: &str| load(&config(text), Path::new("nowhere"), None).unwrap_err().to_string();
        let path = Path::new("nowhere").join("a.csv");
        assert!(refused("format = 'csv'\npath = 'a.csv'").starts_with(&path.display().to_string()));
        assert_eq!(
            refused("format = 'text'\npaths = []\ncontext = 2"),
            "setting paths: expected at least one path, found none"
        );
    }
}
