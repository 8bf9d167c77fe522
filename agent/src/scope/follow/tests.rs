use std::{fs::OpenOptions, io::Write as _};

use super::*;

/// A folder of logs, and who follows them.
struct Logs {
    folder: tempfile::TempDir,
    follower: Follower,
}

impl Logs {
    fn new(pattern: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let follower = follower(&folder, pattern, Vec::new());
        Self { folder, follower }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn append(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn read(&mut self) -> Vec<String> {
        read(&mut self.follower)
    }

    /// Goes on as another process would.
    fn restart(&mut self, pattern: &str) {
        let places = self.follower.places();
        self.follower = follower(&self.folder, pattern, places);
    }
}

fn follower(folder: &tempfile::TempDir, pattern: &str, known: Vec<Place>) -> Follower {
    let pattern = folder.path().join(pattern).display().to_string();
    Follower::new(&[LogSource::Files(pattern)], known).unwrap()
}

/// The numbers of the lines that are new; `live` before those that were written since the last look.
fn read(follower: &mut Follower) -> Vec<String> {
    let mut lines = Vec::new();
    follower.read(&mut |text, is_live| {
        let Text::Line(line) = text else {
            panic!("{text:?}");
        };
        let line = String::from_utf8_lossy(line);
        let number = line.rsplit('[').next().unwrap_or_default();
        let live = if is_live { "live " } else { "" };
        lines.push(format!("{live}{number}"));
    });
    lines
}

fn line(number: u32) -> String {
    format!(" [CONN] [{number}\n")
}

#[test]
fn what_is_written_is_read_once() {
    let mut logs = Logs::new("log");
    assert_eq!(logs.read(), [""; 0]);
    logs.append("log", &line(1));
    assert_eq!(logs.read(), ["1"]);
    assert_eq!(logs.read(), [""; 0]);
    logs.append("log", &format!("{}other\n [CONN", line(2)));
    assert_eq!(logs.read(), ["live 2"]);
    logs.append("log", "] [3\n");
    assert_eq!(logs.read(), ["live 3"]);
}

#[test]
fn a_renamed_file_is_read_to_its_end() {
    let mut logs = Logs::new("*/*.log");
    logs.append("pod/0.log", &line(1));
    logs.read();
    logs.append("pod/0.log", &line(2));
    fs::rename(logs.path("pod/0.log"), logs.path("pod/0.log.2026")).unwrap();
    logs.append("pod/0.log", &line(3));
    assert_eq!(logs.read(), ["live 2", "3"]);
    // The runtime is told only now.
    logs.append("pod/0.log.2026", &line(4));
    logs.append("pod/0.log", &line(5));
    assert_eq!(logs.read(), ["live 4", "live 5"]);
    for _ in 0..=LINGER + 1 {
        logs.read();
    }
    assert_eq!(logs.follower.tails.len(), 1);
}

#[test]
fn a_truncated_file_is_read_from_its_beginning() {
    let mut logs = Logs::new("log");
    logs.append("log", &line(1));
    logs.append("log", &line(2));
    logs.read();
    fs::write(logs.path("log"), line(3)).unwrap();
    assert_eq!(logs.read(), ["live 3"]);
    // Longer than before, when it is looked at again.
    fs::write(logs.path("log"), [line(4), line(5), line(6)].concat()).unwrap();
    assert_eq!(logs.read(), ["live 4", "live 5", "live 6"]);
}

#[test]
fn older_files_come_first_and_compressed_ones_not_at_all() {
    let mut logs = Logs::new("pod-*/*");
    logs.append("pod-b/0.log", &line(1));
    std::thread::sleep(std::time::Duration::from_millis(20));
    logs.append("pod-a/1.log", &line(2));
    logs.append("pod-a/0.log.gz", &line(3));
    assert_eq!(logs.read(), ["1", "2"]);
    logs.append("pod-c/0.log", &line(4));
    assert_eq!(logs.read(), ["4"]);
}

#[test]
fn a_restart_neither_repeats_nor_skips() {
    let mut logs = Logs::new("*.log");
    logs.append("0.log", &format!("{} [CONN] [2", line(1)));
    assert_eq!(logs.read(), ["1"]);
    logs.restart("*.log");
    assert_eq!(logs.read(), [""; 0]);
    logs.append("0.log", "0\n");
    assert_eq!(logs.read(), ["live 20"]);
    // Renamed and replaced while nobody looks.
    logs.restart("*.log");
    logs.append("0.log", &line(3));
    fs::rename(logs.path("0.log"), logs.path("0.log.2026")).unwrap();
    logs.append("0.log", &line(4));
    assert_eq!(logs.read(), ["3", "4"]);
    // Replaced by one that has got the same inode, for all that can be told.
    logs.restart("*.log");
    fs::write(logs.path("0.log"), [line(5), line(6)].concat()).unwrap();
    assert_eq!(logs.read(), ["5", "6"]);
}

#[test]
fn a_file_that_is_gone_is_forgotten() {
    let mut logs = Logs::new("*.log");
    logs.append("0.log", &line(1));
    logs.read();
    logs.restart("*.log");
    fs::remove_file(logs.path("0.log")).unwrap();
    logs.read();
    assert_eq!(logs.follower.places(), []);
}

#[test]
fn one_look_reads_no_more_than_it_may() {
    let mut logs = Logs::new("log");
    let count = MAX_BYTES / line(1_000_000).len() + 1_000;
    let text: String = (0..count as u32)
        .map(|number| line(1_000_000 + number))
        .collect();
    logs.append("log", &text);
    let first = logs.read().len();
    assert!(first < count);
    let second = logs.read().len();
    assert_eq!(first + second, count);
}

/// A file that grows as fast as it is read leaves no room for others. What they have is read when there is some, whatever they
/// are called by then.
#[test]
fn what_there_was_no_room_for_is_read_once() {
    let mut logs = Logs::new("*.log");
    logs.append("a.log", &line(1));
    std::thread::sleep(std::time::Duration::from_millis(20));
    logs.append("b.log", &line(2));
    assert_eq!(logs.read(), ["1", "2"]);
    let other = format!("{}\n", "x".repeat(60_000));
    let looks = LINGER as usize + 3;
    logs.append("a.log", &other.repeat(looks * MAX_BYTES / other.len()));
    logs.append("b.log", &line(3));
    fs::rename(logs.path("b.log"), logs.path("b.log.2026")).unwrap();
    for _ in 0..looks - 1 {
        assert_eq!(logs.read(), [""; 0]);
    }
    let mut read = Vec::new();
    for _ in 0..LINGER + 3 {
        read.extend(logs.read());
    }
    assert_eq!(read, ["live 3"]);
    // Then it is over.
    assert_eq!(logs.follower.tails.len(), 1);
}
