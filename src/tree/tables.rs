//! Every class with its table: the one place where a class meets its rows.

/// Runs the same code on an object of any class, `$value`, with the rows of its class, `$rows`.
macro_rules! with_table {
    ($object:expr, |$rows:ident, $value:ident| $code:expr) => {{
        use crate::inventory::Object;
        match $object {
            Object::Instance($value) => $crate::tree::tables::run!($rows, $crate::tree::instance::ROWS, $code),
            Object::Image($value) => $crate::tree::tables::run!($rows, $crate::tree::image::ROWS, $code),
            Object::Task($value) => $crate::tree::tables::run!($rows, $crate::tree::task::ROWS, $code),
            Object::Flavor($value) => $crate::tree::tables::run!($rows, $crate::tree::flavor::ROWS, $code),
            Object::Volume($value) => $crate::tree::tables::run!($rows, $crate::tree::volume::ROWS, $code),
            Object::Transfer($value) => $crate::tree::tables::run!($rows, $crate::tree::transfer::ROWS, $code),
            Object::Backend($value) => $crate::tree::tables::run!($rows, $crate::tree::backend::ROWS, $code),
        }
    }};
}

/// The same with the rows of a class alone.
macro_rules! with_rows {
    ($class:expr, |$rows:ident| $code:expr) => {{
        use crate::model::Class;
        match $class {
            Class::Instance => $crate::tree::tables::run!($rows, $crate::tree::instance::ROWS, $code),
            Class::Image => $crate::tree::tables::run!($rows, $crate::tree::image::ROWS, $code),
            Class::Task => $crate::tree::tables::run!($rows, $crate::tree::task::ROWS, $code),
            Class::Flavor => $crate::tree::tables::run!($rows, $crate::tree::flavor::ROWS, $code),
            Class::Volume => $crate::tree::tables::run!($rows, $crate::tree::volume::ROWS, $code),
            Class::Transfer => $crate::tree::tables::run!($rows, $crate::tree::transfer::ROWS, $code),
            Class::Backend => $crate::tree::tables::run!($rows, $crate::tree::backend::ROWS, $code),
        }
    }};
}

macro_rules! run {
    ($rows:ident, $table:expr, $code:expr) => {{
        let $rows = $table;
        $code
    }};
}

pub(super) use {run, with_rows, with_table};
