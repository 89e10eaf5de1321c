//! The manual pages and the completions, which are made from the command line's definition.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

const COMMANDS: [&str; 4] = ["mount", "wait", "watch", "doctor"];

fn instancefs(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_instancefs")).args(arguments).output().expect("it runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_commands_of_this_test_are_those_of_the_program() {
    let help = instancefs(&["--help"]);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let named: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(named, COMMANDS);
}

#[test]
fn each_command_has_a_page_with_its_options_exit_codes_and_examples() {
    let directory = tempfile::tempdir().expect("a directory");
    instancefs(&["man", directory.path().to_str().expect("UTF-8")]);
    let mut pages: Vec<String> = COMMANDS.map(|command| format!("instancefs-{command}.1")).to_vec();
    pages.extend(["instancefs.1".to_owned(), "mount.instancefs.8".to_owned()]);
    assert_eq!(directory.path().read_dir().expect("listed").count(), pages.len());
    for page in &pages {
        let text = fs::read_to_string(directory.path().join(page)).expect(page);
        for heading in ["NAME", "SYNOPSIS", "DESCRIPTION", "\"EXIT STATUS\"", "EXAMPLES", "\"SEE ALSO\""] {
            assert!(text.lines().any(|line| line == format!(".SH {heading}")), "{page} has no {heading}");
        }
        assert!(!text.contains("announcer") && !text.contains("in\\-background"), "{page} tells of what is hidden");
    }
    let wait = fs::read_to_string(directory.path().join("instancefs-wait.1")).expect("the page");
    assert!(wait.contains("\\-\\-timeout") && wait.contains("124"), "{wait}");
}

#[test]
fn a_shell_completes_each_command_and_nothing_hidden() {
    for shell in ["bash", "zsh", "fish"] {
        let text = instancefs(&["completions", shell]);
        for command in COMMANDS {
            assert!(text.contains(command), "{shell} does not know {command}");
        }
        assert!(text.contains("state-dir"), "{shell} does not know --state-dir");
        for hidden in ["announcer", "in-background", "capabilities", "greet"] {
            assert!(!text.contains(hidden), "{shell} completes {hidden}");
        }
    }
}

#[test]
fn bash_understands_its_completions() {
    let text = instancefs(&["completions", "bash"]);
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().expect("bash runs");
    bash.stdin.take().expect("piped").write_all(text.as_bytes()).expect("written");
    assert!(bash.wait().expect("waits").success());
}
