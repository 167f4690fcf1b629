//! Dates in templates.

use controlgen_core::{Error, Result};

/// A date and a time of day, in whatever zone the caller means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CivilTime {
    year: i64,
    month: i64,
    day: i64,
    /// Seconds since midnight.
    second: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl CivilTime {
    /// A date of the Gregorian calendar, at midnight.
    ///
    /// # Errors
    /// [`Error::Value`] unless the year is in 1 ..= 9999 and the date exists.
    pub fn date(year: i64, month: i64, day: i64) -> Result<Self> {
        let time = Self { year, month, day, second: 0 };
        let exists = (1..=9999).contains(&year)
            && (1..=12).contains(&month)
            && day >= 1
            && Self::from_days(days(year, month, day)) == time;
        if exists {
            Ok(time)
        } else {
            Err(Error::value("date", "one that exists", format!("{year}-{month}-{day}")))
        }
    }

    /// The same day at another time.
    ///
    /// # Errors
    /// [`Error::Value`] unless hour, minute and second are in 0 ..= 23, 0 ..= 59, 0 ..= 59.
    pub fn at(self, hour: i64, minute: i64, second: i64) -> Result<Self> {
        if (0..24).contains(&hour) && (0..60).contains(&minute) && (0..60).contains(&second) {
            Ok(Self { second: (hour * 60 + minute) * 60 + second, ..self })
        } else {
            let found = format!("{hour}:{minute}:{second}");
            Err(Error::value("time of day", "0:0:0 ..= 23:59:59", found))
        }
    }

    /// The time in UTC, `seconds` after 1970 began.
    ///
    /// # Errors
    /// [`Error::Value`] outside the years 1 ..= 9999.
    pub fn from_unix(seconds: i64) -> Result<Self> {
        let time = Self { second: seconds.rem_euclid(86_400), ..Self::from_days(seconds.div_euclid(86_400)) };
        if (1..=9999).contains(&time.year) {
            Ok(time)
        } else {
            Err(Error::value("seconds since 1970", "a time in the years 1 ..= 9999", seconds))
        }
    }

    /// The date, `days` after 1970-01-01: in eras of 400 years that begin in March, so that the leap day comes last.
    fn from_days(days: i64) -> Self {
        let days = days + 719_468;
        let era = days.div_euclid(146_097);
        let of_era = days.rem_euclid(146_097);
        let year = (of_era - of_era.div_euclid(1460) + of_era.div_euclid(36_524)
            - of_era.div_euclid(146_096))
        .div_euclid(365);
        let of_year = of_era - (365 * year + year.div_euclid(4) - year.div_euclid(100));
        let march = (5 * of_year + 2).div_euclid(153);
        let month = if march < 10 { march + 3 } else { march - 9 };
        let day = of_year - (153 * march + 2).div_euclid(5) + 1;
        Self { year: year + era * 400 + i64::from(month <= 2), month, day, second: 0 }
    }

    /// Python's `strftime`, for the directives that do not depend on zone or locale.
    pub(super) fn strftime(self, format: &str) -> Result<String, String> {
        let (hour, minute) = (self.second.div_euclid(3600), self.second.div_euclid(60).rem_euclid(60));
        let since_1970 = days(self.year, self.month, self.day);
        let of_year = since_1970 - days(self.year, 1, 1) + 1;
        let name = |names: &'static [&'static str], at: i64| {
            usize::try_from(at).ok().and_then(|at| names.get(at)).copied().unwrap_or_default()
        };
        let month = name(&MONTHS, self.month - 1);
        let weekday = name(&WEEKDAYS, (since_1970 + 4).rem_euclid(7));
        let hour12 = (hour + 11).rem_euclid(12) + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            let plain = directive == Some('-'); // no leading zeros
            if plain {
                directive = chars.next();
            }
            let (number, width) = match directive {
                Some('Y') => (self.year, 4),
                Some('y') => (self.year.rem_euclid(100), 2),
                Some('m') => (self.month, 2),
                Some('d') => (self.day, 2),
                Some('H') => (hour, 2),
                Some('I') => (hour12, 2),
                Some('M') => (minute, 2),
                Some('S') => (self.second.rem_euclid(60), 2),
                Some('j') => (of_year, 3),
                Some(text) => {
                    match text {
                        'B' => out.push_str(month),
                        'b' | 'h' => out.extend(month.chars().take(3)),
                        'A' => out.push_str(weekday),
                        'a' => out.extend(weekday.chars().take(3)),
                        'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                        'e' => out.push_str(&format!("{:2}", self.day)),
                        '%' => out.push('%'),
                        other => return Err(format!("strftime_now: unknown directive %{other}")),
                    }
                    continue;
                }
                None => return Err("strftime_now: the format ends in %".into()),
            };
            let width = if plain { 1 } else { width };
            out.push_str(&format!("{number:0width$}"));
        }
        Ok(out)
    }
}

/// Days from 1970-01-01 to a date.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let march = (month + 9).rem_euclid(12);
    let of_year = (153 * march + 2).div_euclid(5) + day - 1;
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `datetime(…).strftime("%Y-%m-%d %H:%M:%S %j %A %B %y %I %p %-d %b %a")` in Python.
    #[test]
    fn dates_are_pythons() {
        let format = "%Y-%m-%d %H:%M:%S %j %A %B %y %I %p %-d %b %a %%";
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 001 Thursday January 70 12 AM 1 Jan Thu %"),
            (951_827_696, "2000-02-29 12:34:56 060 Tuesday February 00 12 PM 29 Feb Tue %"),
            (1_722_038_399, "2024-07-26 23:59:59 208 Friday July 24 11 PM 26 Jul Fri %"),
            (-2_203_891_200, "1900-03-01 00:00:00 060 Thursday March 00 12 AM 1 Mar Thu %"),
            (4_107_542_399, "2100-02-28 23:59:59 059 Sunday February 00 11 PM 28 Feb Sun %"),
        ] {
            assert_eq!(CivilTime::from_unix(seconds).unwrap().strftime(format).unwrap(), expected);
        }
        let time = CivilTime::date(2024, 7, 26).unwrap().at(23, 59, 59).unwrap();
        assert_eq!(time, CivilTime::from_unix(1_722_038_399).unwrap());
    }

    #[test]
    fn dates_that_do_not_exist_are_refused() {
        for (year, month, day) in
            [(2023, 2, 29), (2024, 13, 1), (2024, 0, 1), (2024, 4, 31), (0, 1, 1), (2024, 1, 0)]
        {
            assert!(CivilTime::date(year, month, day).is_err(), "{year}-{month}-{day}");
        }
        assert!(CivilTime::date(2024, 2, 29).unwrap().at(24, 0, 0).is_err());
        assert!(CivilTime::from_unix(i64::MAX).is_err());
        assert!(CivilTime::date(2024, 2, 29).unwrap().strftime("%Q").is_err());
    }
}
